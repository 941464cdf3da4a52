"""GenerationService: how a request becomes a generation, and which generations run."""

import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from loramux.v1 import generation_pb2 as pb
from loramux_server.engine import messages as wire
from loramux_server.errors import Expired, Reason
from loramux_server.lora.engine_link import ResolvedAdapter
from loramux_server.rpc.admission import AdmissionGate, Ticket
from loramux_server.rpc.batch import BatchGeneration, Pinned
from loramux_server.rpc.call import Call, Method
from loramux_server.rpc.engine_client import EngineClient
from loramux_server.rpc.generation import Generation
from loramux_server.rpc.limits import MAX_MESSAGE_BYTES, Limits
from loramux_server.rpc.prompt import PromptEncoder
from loramux_server.rpc.sequence_output import SequenceOutput
from loramux_server.rpc.tokenization import Tokenization
from loramux_server.rpc.validate import (
    Sampling,
    check_request,
    fit_prompt,
    invalid,
)
from loramux_server.telemetry.context import GENERATION_ID
from loramux_server.telemetry.generation import GenerationRecord
from loramux_server.telemetry.setup import Telemetry

SERVICE = "loramux.v1.GenerationService"
_MAX_ID_CHARS = 128
_NOTHING_PINNED: Pinned = MappingProxyType({})


class AdapterResolver(Protocol):
    """From the adapter field of a request to what runs."""

    def resolve(self, tenant: str, adapter: str | None, *, field: str = "adapter") -> ResolvedAdapter:
        """Resolve provisionally: refusals happen here, an alias binds in the engine.

        Args:
            tenant: Acted-for tenant.
            adapter: As in the request; None = the tenant's default.
            field: Request field, for errors.

        Raises:
            LoramuxServerError: ADAPTER_NOT_FOUND, INVALID_PARAMETER, PERMISSION_DENIED.
        """
        ...

    def pin(self, resolved: ResolvedAdapter, *, split_key: str, seed: int) -> ResolvedAdapter:
        """Bind an alias to one version of its traffic now, as the engine would.

        Args:
            resolved: What `resolve` gave.
            split_key: Requests of one key stay on one version; empty = drawn from `seed`.
            seed: One for all that is pinned together.

        Raises:
            LoramuxServerError: ADAPTER_NOT_FOUND.
        """
        ...


class GenerationService:
    """Serves `loramux.v1.GenerationService`."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        limits: Callable[[], Limits],
        prompts: PromptEncoder,
        resolver: AdapterResolver,
        gate: AdmissionGate,
        telemetry: Telemetry,
        token_bytes: Callable[[int], bytes],
        shown_version: Callable[[str], str],
        model_name: str,
        replica_id: str,
        batch_window: int = 64,
    ) -> None:
        """Create the service.

        Args:
            engine: Where requests run.
            limits: Bounds; read for each request, since the engine reports some of them when it is ready.
            prompts: Template and tokenizer.
            resolver: Adapters.
            gate: Bound on waiting requests.
            telemetry: Where generations are recorded.
            token_bytes: Bytes of a token id.
            shown_version: From the engine's version key to the API's version name.
            model_name: Base model, for telemetry.
            replica_id: For `Started`.
            batch_window: Items of one batch in flight at once.
        """
        self._engine = engine
        self._limits = limits
        self._prompts = prompts
        self._resolver = resolver
        self._gate = gate
        self._telemetry = telemetry
        self._token_bytes = token_bytes
        self._shown_version = shown_version
        self._model_name = model_name
        self._replica_id = replica_id
        self._batch_window = batch_window
        self._generations: dict[str, Generation] = {}

    def methods(self) -> Mapping[str, Method]:
        """List the handlers by full method name."""
        tokenization = Tokenization(self._prompts, self._limits)
        return {
            f"/{SERVICE}/Generate": Method(
                request_type=pb.GenerateRequest,
                handler=self.generate,
                kind="unary_stream",
                max_bytes=MAX_MESSAGE_BYTES,
            ),
            f"/{SERVICE}/BatchGenerate": Method(
                request_type=pb.BatchGenerateRequest,
                handler=self.batch_generate,
                kind="unary_stream",
                max_bytes=MAX_MESSAGE_BYTES,
            ),
            f"/{SERVICE}/Tokenize": Method(
                request_type=pb.TokenizeRequest,
                handler=tokenization.tokenize,
                kind="unary_unary",
                max_bytes=MAX_MESSAGE_BYTES,
            ),
            f"/{SERVICE}/Detokenize": Method(
                request_type=pb.DetokenizeRequest,
                handler=tokenization.detokenize,
                kind="unary_unary",
                max_bytes=MAX_MESSAGE_BYTES,
            ),
            f"/{SERVICE}/CancelGeneration": Method(
                request_type=pb.CancelGenerationRequest, handler=self.cancel_generation, kind="unary_unary"
            ),
        }

    # --- generate --------------------------------------------------------------------------------------------------

    def generate(self, request: pb.GenerateRequest, call: Call) -> "GenerationStream":
        """Generate n sequences from one prompt."""
        return GenerationStream(self, request, call)

    def batch_generate(
        self, request: pb.BatchGenerateRequest, call: Call
    ) -> AsyncGenerator[pb.BatchGenerateResponse, None]:
        """Run many independent requests."""
        batch = BatchGeneration(
            request,
            call,
            limits=self._limits(),
            gate=self._gate,
            window=self._batch_window,
            start=self.accept,
            pin=self._pin,
        )
        return batch.events(self.run)

    async def accept(
        self,
        request: pb.GenerateRequest,
        call: Call,
        *,
        ticket: Ticket | None = None,
        pinned: Pinned = _NOTHING_PINNED,
        prefix: str = "",
        time_limit: float | None = None,
    ) -> Generation:
        """Validate, tokenize and resolve; nothing reaches the engine yet.

        Args:
            request: As received.
            call: The call.
            ticket: A place in the queue that was taken before; None takes one or refuses.
            pinned: What pairs of adapter field and split key were bound to before.
            prefix: Put before field names.
            time_limit: Seconds that the request may take, besides the deadline of the call.

        Returns:
            A generation that owns the ticket.

        Raises:
            LoramuxServerError: Refused; a ticket taken here or handed in is given back.
        """
        received = time.monotonic()
        try:
            self._engine.check_serving()
            limits = self._limits()
            sampling = check_request(request, limits, prefix=prefix)
            ticket = ticket or self._gate.enter()
            adapter = request.adapter if request.HasField("adapter") else None
            binding = pinned.get((adapter, sampling.split_key))
            if binding is None:
                binding = self._resolver.resolve(call.tenant, adapter, field=f"{prefix}adapter")
            ids = await self._prompts.encode(request, prefix=prefix)
            ids, max_tokens = fit_prompt(ids, sampling, limits, prefix=prefix)
            add = self._add(ids, max_tokens, sampling, binding, call, limits, received, time_limit)
        except BaseException:
            if ticket is not None:
                ticket.leave()
            raise
        end_ids = frozenset(add.sampling.stop_token_ids)
        if not sampling.ignore_eos:
            end_ids |= frozenset(add.sampling.eos_token_ids)
        GENERATION_ID.set(add.request_id)
        return Generation(
            engine=self._engine,
            add=add,
            tenant=call.tenant,
            outputs=[
                SequenceOutput(
                    self._prompts.tokenizer,
                    stop=sampling.stop,
                    include_stop=sampling.include_stop,
                    end_token_ids=end_ids,
                    min_tokens=sampling.min_tokens,
                )
                for _ in range(sampling.n)
            ],
            token_bytes=self._token_bytes,
            shown_version=self._shown_version,
            replica_id=self._replica_id,
            front_end_time=time.monotonic() - received,
            ticket=ticket,
            record=GenerationRecord(
                self._telemetry.metrics,
                self._telemetry.tracer,
                generation_id=add.request_id,
                operation="chat" if request.WhichOneof("prompt") == "chat" else "text_completion",
                model=self._model_name,
                prompt_tokens=len(ids),
                received=received,
            ),
        )

    async def run(self, generation: Generation) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Yield the events of an accepted generation; while it runs, `CancelGeneration` finds it."""
        self._generations[generation.generation_id] = generation
        events = generation.events()
        try:
            async for event in events:
                yield event
        finally:
            del self._generations[generation.generation_id]
            await events.aclose()

    def _pin(self, tenant: str, adapter: str | None, *, split_key: str, seed: int) -> ResolvedAdapter:
        return self._resolver.pin(self._resolver.resolve(tenant, adapter), split_key=split_key, seed=seed)

    def _add(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        binding: ResolvedAdapter,
        call: Call,
        limits: Limits,
        received: float,
        time_limit: float | None,
    ) -> wire.Add:
        now = time.monotonic()
        deadlines = [d for d in (call.deadline, None if time_limit is None else received + time_limit) if d is not None]
        time_left = min(deadlines) - now if deadlines else None
        if time_left is not None and time_left <= 0:
            raise Expired(Reason.DEADLINE_EXCEEDED, "the deadline passed before the request could be queued")
        soft = sampling.soft_time_limit
        return wire.Add(
            request_id=secrets.token_hex(12),
            prompt_token_ids=prompt,
            sampling=wire.SamplingSpec(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=min(sampling.top_k, limits.vocab_size),
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                logit_bias=sampling.logit_bias,
                seed=sampling.seed,
                max_tokens=max_tokens,
                min_tokens=sampling.min_tokens,
                stop_token_ids=sampling.stop_token_ids,
                eos_token_ids=list(self._prompts.tokenizer.eos_token_ids),
                ignore_eos=sampling.ignore_eos,
                bad_words=self._prompts.word_sequences(sampling.bad_words),
                n=sampling.n,
                logprobs=sampling.logprobs,
                prompt_logprobs=sampling.prompt_logprobs,
            ),
            alias=binding.alias,
            version=binding.version,
            split_key=sampling.split_key,
            salt=binding.tenant.salt,
            fairness_key=call.tenant,
            weight=binding.tenant.weight,
            priority=sampling.priority,
            time_left=time_left,
            soft_time_limit=None if soft is None else max(1e-3, soft - (now - received)),
        )

    # --- cancel ----------------------------------------------------------------------------------------------------

    async def cancel_generation(self, request: pb.CancelGenerationRequest, call: Call) -> pb.CancelGenerationResponse:
        """End a running generation of the acted-for tenant."""
        if not 1 <= len(request.generation_id) <= _MAX_ID_CHARS:
            raise invalid(
                "generation_id", f"has {len(request.generation_id)} characters", "use the one that Started carried"
            )
        generation = self._generations.get(request.generation_id)
        found = generation is not None and generation.tenant == call.tenant and generation.alive
        if generation is not None and found:
            generation.cancel()
        return pb.CancelGenerationResponse(cancelled=found, replica_id=self._replica_id)

    # --- what others ask -------------------------------------------------------------------------------------------

    def tenants(self) -> set[str]:
        """Tenants with a generation in progress."""
        return {generation.tenant for generation in self._generations.values()}

    def counts(self, tenant: str) -> Counter[bool]:
        """Generations of a tenant in progress, by whether they have started."""
        return Counter(generation.started for generation in self._generations.values() if generation.tenant == tenant)

    def check_integrity(self) -> None:
        """Assert that nothing is left when nothing runs."""
        self._engine.check_integrity()
        waiting = sum(1 for generation in self._generations.values() if not generation.started)
        assert waiting <= self._gate.queued, "a waiting generation has no ticket"


class GenerationStream:
    """Response iterator of `Generate` that tells the pipeline how much output waits behind it."""

    def __init__(self, service: GenerationService, request: pb.GenerateRequest, call: Call) -> None:
        """Prepare; the request is accepted when the iteration begins."""
        self._service = service
        self._generation: Generation | None = None
        self._events = self._run(request, call)

    @property
    def pending_bytes(self) -> int:
        """Bytes of output that wait for the reader."""
        return 0 if self._generation is None else self._generation.pending_bytes

    def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]:
        """Iterate the events."""
        return self._events

    async def aclose(self) -> None:
        """Leave: the engine drops the request if it still runs."""
        await self._events.aclose()

    async def _run(self, request: pb.GenerateRequest, call: Call) -> AsyncGenerator[pb.GenerateResponse, None]:
        self._generation = await self._service.accept(request, call)
        events = self._service.run(self._generation)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
