"""Every living request: arrival, timers, preemption and the one `Done`; all that a request holds is given back here."""

import heapq
from collections import OrderedDict
from collections.abc import Callable

from loramux_server.engine.aliases import AliasTable
from loramux_server.engine.counters import Counters
from loramux_server.engine.fairness import FairnessPolicy
from loramux_server.engine.kv import KvCache
from loramux_server.engine.limits import Limits
from loramux_server.engine.messages import Add, Done, ErrorSpec, Event, SequenceFinished
from loramux_server.engine.prefix_cache import root_key
from loramux_server.engine.request import Phase, Request
from loramux_server.engine.residency import AdapterResidency
from loramux_server.engine.sequence import Sequence
from loramux_server.engine.waiting import WaitingQueue
from loramux_server.engine.wire_error import error_spec
from loramux_server.errors import Expired, LoramuxServerError, NotFound, Reason

_REMEMBERED_IDS = 65536


class RequestTable:
    """Owner of requests and sequences.

    Args:
        kv: Pages.
        residency: Adapter references and uses.
        aliases: Where adapter names point.
        fairness: Told which keys are active.
        limits: Bounds checked on arrival.
        counters: Told how requests end.
        emit: Takes `SequenceFinished` and `Done`.
        fingerprint: Base fingerprint, part of every prefix-cache root.
    """

    def __init__(
        self,
        *,
        kv: KvCache,
        residency: AdapterResidency,
        aliases: AliasTable,
        fairness: FairnessPolicy,
        limits: Limits,
        counters: Counters,
        emit: Callable[[Event], None],
        fingerprint: str,
    ) -> None:
        self._kv = kv
        self._residency = residency
        self._aliases = aliases
        self._fairness = fairness
        self._limits = limits
        self._counters = counters
        self._emit = emit
        self._fingerprint = fingerprint
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._arrivals = 0
        self._timers: list[tuple[float, int, bool, Request]] = []
        self._requests_of_key: dict[str, int] = {}
        self._sequences: dict[int, tuple[Request, Sequence]] = {}
        self._free_ids: list[int] = []
        self._ids_made = 0
        self._released: list[tuple[int, bool]] = []
        self._cooling: list[int] = []

    def __len__(self) -> int:
        """Living requests."""
        return len(self._requests)

    def get(self, request_id: str) -> Request | None:
        """A living request."""
        return self._requests.get(request_id)

    def requests(self) -> list[Request]:
        """All living requests."""
        return list(self._requests.values())

    def sequence(self, sequence_id: int) -> tuple[Request, Sequence] | None:
        """A living sequence with its request."""
        return self._sequences.get(sequence_id)

    @property
    def changes(self) -> tuple[int, int, int]:
        """Moves whenever an adapter request that could not start might start now; pages and rows apart."""
        return self.waiting.changes, self._aliases.changes, self._residency.changes

    # --- arrival ---------------------------------------------------------------------------------------------------

    def arrive(self, add: Add, now: float, *, refusal: LoramuxServerError | None = None) -> None:
        """Take a request in, or answer it at once; an id seen before is ignored.

        Args:
            add: The command.
            now: Monotonic seconds.
            refusal: Refuse it for this reason.
        """
        if add.request_id in self._requests or add.request_id in self._recent:
            return
        try:
            if refusal is not None:
                raise refusal
            request = self._admit_to_queue(add, now)
        except LoramuxServerError as error:
            self._remember(add.request_id)
            self._counters.count_end("failed")
            self._emit(
                Done(
                    request_id=add.request_id,
                    status="failed",
                    error=error_spec(error),
                    prompt_tokens=len(add.prompt_token_ids),
                )
            )
            return
        self._requests[add.request_id] = request
        key = add.fairness_key
        self._requests_of_key[key] = self._requests_of_key.get(key, 0) + 1
        self._fairness.activate(key, add.weight)
        self.waiting.push(request)
        if request.uses_adapter:
            version, _ = self.resolve(request)
            self._residency.expect(version)
        if add.time_left is not None:
            self._set_timer(now + add.time_left, request, hard=True)
        if add.soft_time_limit is not None:
            self._set_timer(now + add.soft_time_limit, request, hard=False)

    def _admit_to_queue(self, add: Add, now: float) -> Request:
        max_tokens = self._limits.output_tokens(add, self._kv)
        self._arrivals += 1
        sampling = add.sampling
        request = Request(
            add=add,
            order=self._arrivals,
            arrival=now,
            max_tokens=max_tokens,
            end_ids=frozenset(sampling.stop_token_ids + ([] if sampling.ignore_eos else sampling.eos_token_ids)),
        )
        if add.version is not None:
            self.bind(request, add.version, 0)
        elif add.alias is not None:
            self.resolve(request)
        else:
            request.root = self.root_for(request, "")
        return request

    def resolve(self, request: Request) -> tuple[str, int]:
        """The version that a request has or would be bound to now, and the alias revision that says so.

        Raises:
            NotFound: The alias points nowhere, or to a version that is not served.
        """
        if request.bound:
            return request.version, request.revision
        add = request.add
        assert add.alias is not None
        target = self._aliases.resolve(add.alias, split_key=add.split_key, seed=add.sampling.seed)
        if target is None or not self._residency.serves(target[0]):
            raise NotFound(Reason.ADAPTER_NOT_FOUND, f"adapter {add.alias} serves no version")
        return target

    def bind(self, request: Request, version: str, revision: int) -> None:
        """Bind a version for good and take the reference.

        Raises:
            NotFound: The version is not served.
        """
        request.digest = self._residency.bind(version)
        request.version, request.revision, request.bound = version, revision, True
        request.root = self.root_for(request, version)

    def root_for(self, request: Request, version: str) -> bytes:
        """Prefix-cache root of a request under a known version; "" = the base."""
        digest = self._residency.digest(version) if version else ""
        return root_key(fingerprint=self._fingerprint, salt=request.add.salt, digest=digest)

    def open(self, request: Request) -> None:
        """Create the sequences of a request that has none yet."""
        if request.sequences:
            return
        for choice in range(request.add.sampling.n):
            if not self._free_ids:
                self._free_ids.append(self._ids_made)
                self._ids_made += 1
            sequence_id = self._free_ids.pop()
            sequence = Sequence(sequence_id=sequence_id, choice=choice, prompt=request.add.prompt_token_ids)
            request.sequences.append(sequence)
            request.alive.append(sequence)
            self._sequences[sequence_id] = (request, sequence)

    # --- timers ----------------------------------------------------------------------------------------------------

    def _set_timer(self, at: float, request: Request, *, hard: bool) -> None:
        if len(self._timers) > 4 * len(self._requests) + 1024:
            self._timers = [timer for timer in self._timers if timer[3].phase is not Phase.DONE]
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, (at, request.order, hard, request))

    def expire(self, now: float) -> None:
        """End requests whose time is over: a deadline fails them, a soft limit keeps what there is."""
        while self._timers and self._timers[0][0] <= now:
            _, _, hard, request = heapq.heappop(self._timers)
            if request.phase is Phase.DONE:
                continue
            if hard or request.admitted_at is None:
                limit = "deadline" if hard else "soft_time_limit"
                state = "before it was admitted" if request.admitted_at is None else "while it ran"
                error = Expired(Reason.DEADLINE_EXCEEDED, f"the {limit} passed {state}")
                self.end(request, "failed", now, error=error_spec(error))
                continue
            for sequence in list(request.alive):
                self.finish_sequence(request, sequence, "time_limit", now)

    def next_timer(self) -> float | None:
        """Monotonic time of the next expiry, None without one."""
        return self._timers[0][0] if self._timers else None

    # --- the end ---------------------------------------------------------------------------------------------------

    def finish_sequence(
        self,
        request: Request,
        sequence: Sequence,
        reason: str,
        now: float,
        *,
        stop_token_id: int | None = None,
        tokens: int | None = None,
    ) -> None:
        """End one sequence by itself; the last one ends the request."""
        sequence.finish(reason, tokens=tokens)
        request.alive.remove(sequence)
        self._drop_sequence(sequence)
        self._emit(
            SequenceFinished(
                request_id=request.request_id,
                index=sequence.choice,
                reason=reason,
                stop_token_id=stop_token_id,
                tokens=sequence.final_tokens,
            )
        )
        if not request.alive:
            self.end(request, "finished", now)

    def end(self, request: Request, status: str, now: float, *, error: ErrorSpec | None = None) -> None:
        """Give back everything a living request holds and answer it."""
        assert request.phase is not Phase.DONE, "a request ends once"
        if request.phase is Phase.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        request.phase = Phase.DONE
        for sequence in request.alive:
            self._drop_sequence(sequence)
        self._leave_slab(request)
        if request.bound:
            self._residency.unbind(request.version)
        key = request.add.fairness_key
        self._requests_of_key[key] -= 1
        if not self._requests_of_key[key]:
            del self._requests_of_key[key]
            self._fairness.deactivate(key)
        del self._requests[request.request_id]
        self._remember(request.request_id)
        self._counters.count_end(status)
        first, admitted = request.first_token_at, request.admitted_at
        self._emit(
            Done(
                request_id=request.request_id,
                status=status,
                error=error,
                prompt_tokens=request.prompt_length,
                cached_tokens=request.cached_tokens,
                output_tokens=request.output_tokens,
                computed_tokens=request.computed_tokens,
                prefill_time=first - admitted if first is not None and admitted is not None else 0.0,
                decode_time=now - first if first is not None else 0.0,
                preemptions=request.preemptions,
            )
        )

    def preempt(self, request: Request) -> None:
        """Take a running request off the device; it waits at its old place and is recomputed."""
        self.running.remove(request)
        for sequence in request.alive:
            self._kv.release(sequence)
            if sequence.launched:
                self._released.append((sequence.sequence_id, False))
                sequence.launched = False
        self._leave_slab(request)
        request.phase, request.forked = Phase.WAITING, False
        request.preemptions += 1
        self._counters.preemptions += 1
        self.waiting.push(request)

    def take_released(self) -> list[int]:
        """Sequence ids whose device state may go, since the last call.

        An id is given out again one call later: by then no launched step has a row of its last owner.
        """
        released, self._released = self._released, []
        self._free_ids.extend(self._cooling)
        self._cooling = [sequence_id for sequence_id, ended in released if ended]
        return [sequence_id for sequence_id, _ in released]

    def _leave_slab(self, request: Request) -> None:
        if request.slot >= 0:
            self._residency.release(request.version)
            request.slot = -1

    def _drop_sequence(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        del self._sequences[sequence.sequence_id]
        self._released.append((sequence.sequence_id, True))

    def _remember(self, request_id: str) -> None:
        self._recent[request_id] = None
        if len(self._recent) > _REMEMBERED_IDS:
            self._recent.popitem(last=False)

    def check_integrity(self) -> None:
        """Assert that every request is in one place and everything it holds is counted."""
        waiting, running = list(self.waiting), self.running
        assert len(waiting) == len(self.waiting)
        assert {id(r) for r in waiting} | {id(r) for r in running} == {id(r) for r in self._requests.values()}
        assert len(waiting) + len(running) == len(self._requests)
        assert all(r.phase is Phase.WAITING and r.slot == -1 for r in waiting)
        assert all(r.phase is Phase.RUNNING and r.alive for r in running)
        assert all(not s.pages and not s.computed for r in waiting for s in r.sequences)
        alive = [sequence for request in self._requests.values() for sequence in request.alive]
        assert all((s in r.alive) == (s.finish_reason is None) for r in self._requests.values() for s in r.sequences)
        assert {s.sequence_id for s in alive} == set(self._sequences) and len(alive) == len(self._sequences)
        references: dict[str, int] = {}
        uses: dict[str, int] = {}
        for request in self._requests.values():
            if request.bound:
                references[request.version] = references.get(request.version, 0) + 1
            if request.slot >= 0:
                uses[request.version] = uses.get(request.version, 0) + 1
        self._residency.check_integrity(references=references, uses=uses)
        self._kv.check_integrity([s for r in self._requests.values() for s in r.sequences])
