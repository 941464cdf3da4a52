"""Admission: which waiting requests start now, in fairness order, given rows, pages and slab room.

A request without room for its adapter (or whose adapter still loads) is skipped and blocks nobody. When newer adapter
requests were admitted past it `MAX_PASSED_OVER` times it is *aged*: the oldest aged request is tried first, and a place
in the slab is drained for it. Rows and pages on the other hand are handed out strictly in order: the first request that
lacks them ends the pass, so that a large request is not starved by small ones.
"""

import enum
from collections import deque
from collections.abc import Callable, Iterator

from loramux_server.engine.adapter_version import Room
from loramux_server.engine.counters import Counters
from loramux_server.engine.fairness import FairnessPolicy
from loramux_server.engine.kv import KvCache
from loramux_server.engine.messages import ErrorSpec, Event, Started
from loramux_server.engine.request import Phase, Request
from loramux_server.engine.request_table import RequestTable
from loramux_server.engine.residency import AdapterResidency
from loramux_server.engine.wire_error import error_spec
from loramux_server.errors import LoramuxServerError

MAX_PASSED_OVER = 8
"""Newer adapter requests that may be admitted past a request that finds no slab room."""


class _Outcome(enum.Enum):
    ADMITTED = enum.auto()
    NO_ROOM = enum.auto()
    LOADING = enum.auto()
    ENDED = enum.auto()
    FULL = enum.auto()


class Admission:
    """Moves requests from waiting to running.

    Args:
        table: Requests.
        kv: Pages.
        residency: Slab.
        fairness: Order between keys.
        counters: Prefix-cache counters.
        emit: Takes `Started`.
    """

    def __init__(
        self,
        *,
        table: RequestTable,
        kv: KvCache,
        residency: AdapterResidency,
        fairness: FairnessPolicy,
        counters: Counters,
        emit: Callable[[Event], None],
    ) -> None:
        self._table = table
        self._kv = kv
        self._residency = residency
        self._fairness = fairness
        self._counters = counters
        self._emit = emit
        self._admissions = 0
        # State in which the last pass tried every request and none could start.
        self._exhausted: tuple[int, int, int] | None = None
        self._aged: dict[int, Request] = {}

    def admit(self, *, rows: int, now: float) -> Iterator[Request]:
        """Admit requests one by one for as long as the caller asks for more.

        Args:
            rows: Rows that the step can still take.
            now: Monotonic seconds.
        """
        if self._exhausted == self._table.changes:
            # A long queue of requests without slab room would otherwise be tried in every step.
            return
        try:
            yield from self._admit(rows, now)
        finally:
            self._residency.end_of_pass()

    def _admit(self, rows: int, now: float) -> Iterator[Request]:
        oldest = self._reserve_for_aged()
        before = self._table.changes
        passed: list[Request] = []
        for request in self._candidates(oldest):
            if rows <= 0:
                return
            if request.phase is not Phase.WAITING:
                continue
            newcomer = oldest is not None and request.order > oldest.order
            outcome = self._try(request, rows=rows, newcomer=newcomer, now=now)
            if outcome is _Outcome.FULL:
                return
            if outcome is _Outcome.NO_ROOM:
                passed.append(request)
            if outcome is _Outcome.ADMITTED:
                rows -= request.width
                if request.uses_adapter:
                    self._age(passed, request)
                yield request
        if self._table.changes == before:
            self._exhausted = before

    def fail_waiting(self, version: str, error: ErrorSpec, now: float) -> None:
        """Fail every waiting request that has or would get `version`: it cannot be loaded."""
        for request in list(self._table.waiting):
            if not request.uses_adapter:
                continue
            try:
                wanted, _ = self._table.resolve(request)
            except LoramuxServerError:
                continue
            if wanted == version:
                self._table.end(request, "failed", now, error=error)

    def _candidates(self, oldest: Request | None) -> Iterator[Request]:
        if oldest is not None:
            yield oldest
        untried = {key: deque(queue) for key, queue in self._table.waiting.snapshot().items()}
        waiting = -1
        key = ""
        while True:
            if len(self._table.waiting) != waiting or not untried[key]:
                # The last attempt moved or ended requests, perhaps many, or the key has no more: whose turn is it now?
                waiting = len(self._table.waiting)
                self._strip(untried, oldest)
                if not untried:
                    return
                key = self._fairness.pick(untried)
            request = untried[key].popleft()
            if request is not oldest:
                yield request

    @staticmethod
    def _strip(untried: dict[str, deque[Request]], oldest: Request | None) -> None:
        """Drop what no longer waits at the head of each queue, and empty queues: their keys may be unknown by now."""
        for key, queue in list(untried.items()):
            while queue and (queue[0] is oldest or queue[0].phase is not Phase.WAITING):
                queue.popleft()
            if not queue:
                del untried[key]

    def _try(self, request: Request, *, rows: int, newcomer: bool, now: float) -> _Outcome:
        if request.width > rows:
            return _Outcome.FULL
        version, revision = "", 0
        if request.uses_adapter:
            try:
                version, revision = self._table.resolve(request)
            except LoramuxServerError as error:
                self._table.end(request, "failed", now, error=error_spec(error))
                return _Outcome.ENDED
            try:
                room = self._residency.want(version, newcomer=newcomer)
            except LoramuxServerError as error:
                self.fail_waiting(version, error_spec(error), now)
                return _Outcome.ENDED
            if room is Room.LOADING:
                if request.load_wait_since is None:
                    request.load_wait_since = now
                return _Outcome.LOADING
            if room is Room.NONE:
                request.load_wait_since = None
                return _Outcome.NO_ROOM
        return self._start(request, version, revision, now)

    def _start(self, request: Request, version: str, revision: int, now: float) -> _Outcome:
        kv, table = self._kv, self._table
        root = request.root if request.bound or not version else table.root_for(request, version)
        table.open(request)
        alive = request.alive
        lead = alive[0]
        if root != request.root:
            request.root = root
            for sequence in alive:
                sequence.keys.clear()
        reusable = self._reusable(request)
        # Each running sequence may soon need one more page: leaving room for it avoids preempting what just started.
        spare = sum(other.width for other in table.running)
        need = kv.admission_cost(lead, root=root, reusable=reusable) + spare
        shared = (request.prompt_length - 1) // kv.page_size
        need += sum(kv.pages_for(len(sequence.tokens)) - shared for sequence in alive[1:])
        if need > kv.pool.available:
            return _Outcome.FULL
        if version:
            if not request.bound:
                table.bind(request, version, revision)
            request.slot = self._residency.acquire(version)
        cached = kv.admit(lead, root=root, reusable=reusable)
        self._move(request, cached, now)
        return _Outcome.ADMITTED

    def _reusable(self, request: Request) -> int:
        """Tokens that may come from the prefix cache: never all, none while prompt log-probabilities are owed."""
        if request.owes_prompt_logprobs:
            return 0
        alive = request.alive
        return request.prompt_length - 1 if len(alive) > 1 else len(alive[0].tokens) - 1

    def _move(self, request: Request, cached: int, now: float) -> None:
        table = self._table
        table.waiting.remove(request)
        table.running.append(request)
        request.phase = Phase.RUNNING
        request.passed_over = 0
        self._aged.pop(request.order, None)
        self._admissions += 1
        request.admitted_order = self._admissions
        self._fairness.admitted(request.add.fairness_key)
        if request.admitted_at is not None:
            return
        request.admitted_at = now
        request.cached_tokens = cached
        self._counters.prefix_query_tokens += request.prompt_length
        self._counters.prefix_hit_tokens += cached
        waited = request.load_wait_since
        self._emit(
            Started(
                request_id=request.request_id,
                version=request.version,
                digest=request.digest,
                revision=request.revision,
                cached_tokens=cached,
                queue_time=now - request.arrival,
                load_time=now - waited if waited is not None else 0.0,
            )
        )

    def _age(self, passed: list[Request], admitted: Request) -> None:
        for request in passed:
            if request.order < admitted.order and request.phase is Phase.WAITING:
                request.passed_over += 1
                if request.passed_over >= MAX_PASSED_OVER:
                    self._aged[request.order] = request

    def _reserve_for_aged(self) -> Request | None:
        for order in [order for order, request in self._aged.items() if request.phase is not Phase.WAITING]:
            del self._aged[order]
        oldest = self._aged[min(self._aged)] if self._aged else None
        version: str | None = None
        if oldest is not None:
            try:
                version, _ = self._table.resolve(oldest)
            except LoramuxServerError:
                # The attempt that follows ends it with this error.
                version = None
        self._residency.reserve(version)
        return oldest
