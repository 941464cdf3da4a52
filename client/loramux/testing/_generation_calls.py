"""Generation and model calls of the fake server: one token is one byte of UTF-8."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from loramux._types import FinishReason
from loramux._version import __version__
from loramux.testing._registry import REPLICA, Registry, invalid, now
from loramux.testing._script import FakeError, Reply
from loramux.v1 import common_pb2, model_pb2
from loramux.v1 import generation_pb2 as pb

MAX_MODEL_LEN = 4096
_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


def _chat_text(chat: pb.ChatPrompt) -> str:
    """Render a chat: role and content a line."""
    return "".join(f"{pb.ChatRole.Name(m.role)[10:].lower()}: {m.content}\n" for m in chat.messages)


def _prompt_text(request: pb.GenerateRequest) -> str:
    """Return the text that is echoed: the last message of a chat, or the whole prompt."""
    kind = request.WhichOneof("prompt")
    if kind == "text" and request.text:
        return request.text
    if kind == "token_ids" and request.token_ids.ids:
        return bytes(token_id % 256 for token_id in request.token_ids.ids).decode("utf-8", "replace")
    if kind == "chat" and request.chat.messages:
        return request.chat.messages[-1].content
    raise invalid("prompt", "is empty")


def _prompt_tokens(request: pb.GenerateRequest) -> list[int]:
    """Return the prompt's token ids."""
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        return list(request.token_ids.ids)
    return list((_chat_text(request.chat) if kind == "chat" else request.text).encode())


def _check(request: pb.GenerateRequest) -> None:
    """Refuse a few values that a real server refuses."""
    sampling = request.sampling
    if request.HasField("adapter") and not request.adapter:
        raise invalid("adapter", "is empty")
    if sampling.HasField("temperature") and not 0 <= sampling.temperature <= 10:
        raise invalid("sampling.temperature", f"is {sampling.temperature}; it must be 0 to 10")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise invalid("sampling.top_p", f"is {sampling.top_p}; it must be above 0, at most 1")
    if sampling.HasField("max_tokens") and not 1 <= sampling.max_tokens <= MAX_MODEL_LEN:
        raise invalid("sampling.max_tokens", f"is {sampling.max_tokens}; it must be 1 to {MAX_MODEL_LEN}")
    if sampling.HasField("n") and not 1 <= sampling.n <= 16:
        raise invalid("sampling.n", f"is {sampling.n}; it must be 1 to 16")


def _echo(request: pb.GenerateRequest, prompt: str) -> tuple[Reply, pb.MatchedStop | None]:
    """Return the answer without a script: the prompt's own text, cut by max_tokens and stop."""
    sampling, text = request.sampling, prompt
    matched: pb.MatchedStop | None = pb.MatchedStop(eos_token_id=0)
    reason = FinishReason.STOP
    data = text.encode()
    if sampling.HasField("max_tokens") and len(data) > sampling.max_tokens:
        text = data[: sampling.max_tokens].decode("utf-8", "ignore")
        matched, reason = None, FinishReason.LENGTH
    hits = [(text.index(stop), stop) for stop in sampling.stop if stop in text]
    if hits:
        position, stop = min(hits)
        text = text[: position + len(stop)] if sampling.include_stop else text[:position]
        matched, reason = pb.MatchedStop(stop=stop), FinishReason.STOP
    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
    return Reply(pieces, finish_reason=reason), matched


def _logprobs(token_ids: Sequence[int], top: int, *, first: bool = False) -> list[pb.PositionLogprobs]:
    """Make up log-probabilities: the chosen token first, its neighbours after it."""
    positions = []
    for index, token_id in enumerate(token_ids):
        position = pb.PositionLogprobs(token=pb.TokenLogprob(token_id=token_id, token_bytes=bytes([token_id % 256])))
        if not (first and index == 0):
            position.token.logprob = -0.5
            for rank in range(top):
                other = (token_id + rank) % 256
                position.top.add(token_id=other, logprob=-0.5 - rank, token_bytes=bytes([other]))
        positions.append(position)
    return positions


class GenerationCalls:
    """Handlers of GenerationService and ModelService; each takes the tenant and the request.

    Args:
        registry: Adapters.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.replies: deque[Reply] = deque()
        self._running: dict[str, tuple[str, asyncio.Event]] = {}

    async def generate(self, tenant: str, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Run one generation."""
        _check(request)
        prompt, prompt_ids = _prompt_text(request), _prompt_tokens(request)
        matched: pb.MatchedStop | None = None
        if self.replies:
            reply = self.replies.popleft()
        else:
            reply, matched = _echo(request, prompt)
        version = self._registry.version(tenant, request.adapter) if request.HasField("adapter") else None
        generation_id, stop = uuid.uuid4().hex, asyncio.Event()
        self._running[generation_id] = (tenant, stop)
        output_tokens = 0
        try:
            started = pb.Started(
                generation_id=generation_id,
                replica_id=REPLICA,
                prompt_tokens=len(prompt_ids),
                seed=request.sampling.seed if request.sampling.HasField("seed") else 1,
            )
            if version is not None:
                started.adapter.adapter = version.name.partition("/versions/")[0]
                started.adapter.version, started.adapter.digest = version.name, version.digest
                started.adapter.revision = self._registry.revision
            yield pb.GenerateResponse(started=started)
            if request.sampling.HasField("prompt_logprobs"):
                positions = _logprobs(prompt_ids, request.sampling.prompt_logprobs, first=True)
                yield pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(positions=positions))
            async for event in self._run(request, reply, matched, stop, len(prompt_ids)):
                output_tokens += len(event.delta.token_ids)
                yield event
        finally:
            del self._running[generation_id]
            name = "" if version is None else version.name
            self._registry.count(tenant, name, len(prompt_ids), output_tokens)

    async def _run(
        self,
        request: pb.GenerateRequest,
        reply: Reply,
        matched: pb.MatchedStop | None,
        stop: asyncio.Event,
        prompt_tokens: int,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Send what the reply says."""
        sampling = request.sampling
        n = sampling.n if sampling.HasField("n") else 1
        output_tokens = 0
        for piece in reply.pieces:
            if reply.delay:
                await asyncio.sleep(reply.delay)
            if stop.is_set():
                break
            token_ids = list(piece.encode())
            for index in range(n):
                delta = pb.Delta(index=index, text=piece, token_ids=token_ids)
                if sampling.HasField("logprobs"):
                    delta.logprobs.extend(_logprobs(token_ids, sampling.logprobs))
                output_tokens += len(token_ids)
                yield pb.GenerateResponse(delta=delta)
        if reply.hang:
            await stop.wait()
        elif reply.error is not None:
            raise reply.error
        elif reply.truncated:
            return
        for index in range(n):
            finished = pb.Finished(index=index, reason=_FINISH[reply.finish_reason])
            if stop.is_set():
                finished.reason = pb.FINISH_REASON_CANCELLED
            elif matched is not None:
                finished.matched_stop.CopyFrom(matched)
            yield pb.GenerateResponse(finished=finished)
        usage = pb.Usage(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        yield pb.GenerateResponse(usage=usage)

    async def batch(
        self, tenant: str, request: pb.BatchGenerateRequest
    ) -> AsyncGenerator[pb.BatchGenerateResponse, None]:
        """Run the items one after the other."""
        if not 1 <= len(request.items) <= 1024:
            raise invalid("items", "must have 1 to 1,024 entries")
        if len({item.item_id for item in request.items}) < len(request.items):
            raise invalid("items", "have equal ids")
        for item in request.items:
            try:
                async for event in self.generate(tenant, item.request):
                    yield pb.BatchGenerateResponse(item_id=item.item_id, event=event)
            except FakeError as error:
                yield pb.BatchGenerateResponse(item_id=item.item_id, status=error.status())

    async def tokenize(self, tenant: str, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Turn text into bytes."""
        text = _chat_text(request.chat) if request.WhichOneof("prompt") == "chat" else request.text
        response = pb.TokenizeResponse(token_ids=list(text.encode()), max_model_len=MAX_MODEL_LEN)
        if request.include_offsets:
            for index, character in enumerate(text):
                for _ in character.encode():
                    response.offsets.add(start=index, end=index + 1)
        return response

    async def detokenize(self, tenant: str, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Turn bytes into text."""
        if any(token_id > 255 for token_id in request.token_ids):
            raise invalid("token_ids", "has an id outside of the vocabulary of 256")
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode("utf-8", "replace"))

    async def cancel(self, tenant: str, request: pb.CancelGenerationRequest) -> pb.CancelGenerationResponse:
        """End a generation."""
        owner, stop = self._running.get(request.generation_id, (None, None))
        found = stop is not None and owner == tenant
        if stop is not None and found:
            stop.set()
        return pb.CancelGenerationResponse(cancelled=found, replica_id=REPLICA)

    async def model(self, tenant: str, request: model_pb2.GetModelRequest) -> model_pb2.GetModelResponse:
        """Describe the model."""
        return model_pb2.GetModelResponse(
            model=model_pb2.Model(
                name="fake",
                family="llama",
                fingerprint=common_pb2.BaseFingerprint(digest="0" * 64, quantization="none"),
                weight_format=common_pb2.WEIGHT_FORMAT_FP32,
                vocab_size=256,
                max_model_len=MAX_MODEL_LEN,
                eos_token_ids=[0],
                has_chat_template=True,
                limits=model_pb2.Limits(
                    max_output_tokens=MAX_MODEL_LEN,
                    max_sequences=16,
                    max_logprobs=20,
                    max_stop_strings=16,
                    max_stop_token_ids=64,
                    max_bad_words=64,
                    max_batch_items=1024,
                    max_message_bytes=4 * 1024 * 1024,
                    max_lora_rank=64,
                    max_adapter_bytes=1024**3,
                    max_upload_chunk_bytes=1024 * 1024,
                ),
            )
        )

    async def status(self, tenant: str, request: model_pb2.GetServerStatusRequest) -> model_pb2.GetServerStatusResponse:
        """Describe the load."""
        running = sum(1 for owner, _ in self._running.values() if owner == tenant)
        return model_pb2.GetServerStatusResponse(
            status=model_pb2.ServerStatus(
                replica_id=REPLICA,
                server_version=__version__,
                state=model_pb2.SERVER_STATE_SERVING,
                start_time=now(),
                revision=self._registry.revision,
                load_level=model_pb2.LOAD_LEVEL_LOW,
                own=model_pb2.TenantLoad(tenant=tenant, running_requests=running),
            )
        )
