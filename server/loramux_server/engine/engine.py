"""The engine: commands in, steps, events out. Synchronous, single-threaded, in-process; no tensors and no sockets here.

`loop.py` drives it behind a socket; tests drive it directly. One `step()` is

    plan k + 1 = scheduler.schedule(behind=plan k)  ->  launch it  ->  results of step k  ->  commit them

where the device is asynchronous, and plan, launch, results, commit of one step where it is not, or where results are
needed for the next plan. What a commit gives back (pages, slab rows) may go to others at once: a launch that uses it
again runs on the device after the step that is still in flight. Sequence numbers are held back by one step.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from loramux_server.engine.admission import Admission
from loramux_server.engine.aliases import AliasTable
from loramux_server.engine.commit import Committer
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.counters import Counters
from loramux_server.engine.executor import Launched, StepExecutor
from loramux_server.engine.fairness import RoundRobin
from loramux_server.engine.kv import KvCache
from loramux_server.engine.limits import Limits
from loramux_server.engine.messages import (
    Abort,
    Add,
    Command,
    DropAlias,
    DropVersion,
    Event,
    Ping,
    Pong,
    Preload,
    PutAlias,
    PutVersion,
    Ready,
    Shutdown,
    Stats,
    Stop,
    Unload,
)
from loramux_server.engine.plan import RowPlan, Runner, StepPlan, StepResult
from loramux_server.engine.request_table import RequestTable
from loramux_server.engine.residency import AdapterResidency
from loramux_server.engine.scheduler import Scheduler
from loramux_server.errors import Reason, Unavailable

STATS_INTERVAL = 0.25
"""Seconds between two `Stats` while busy."""


class Engine:
    """Scheduler, residency and step loop over one runner.

    Args:
        config: Settings.
        runner: The device behind the step contract.
        clock: Monotonic seconds; tests pass their own.
        fingerprint: Base fingerprint, part of every prefix-cache key.
        max_model_len: The model's longest sequence; None = bounded by the settings and the pool.
        vocab_size: Token ids are below it; None = unchecked.
        tuned_chunk: Prefill chunk that was measured to be best; None = nothing was.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        clock: Callable[[], float] = time.monotonic,
        fingerprint: str = "",
        max_model_len: int | None = None,
        vocab_size: int | None = None,
        tuned_chunk: int | None = None,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._poison = config.poison
        self._events: list[Event] = []
        emit = self._emit
        self.limits = Limits.derive(
            config, runner, max_model_len=max_model_len, vocab_size=vocab_size, tuned_chunk=tuned_chunk
        )
        self._kv = KvCache(
            num_pages=runner.num_pages,
            page_size=runner.page_size,
            prefix_caching=config.prefix_cache,
            track_freed=config.poison,
        )
        self._counters = Counters()
        self._aliases = AliasTable()
        fairness = RoundRobin()
        self._residency = AdapterResidency(runner.slab, emit=emit, on_forget=self._kv.prefix.forget_owner)
        self._table = RequestTable(
            kv=self._kv,
            residency=self._residency,
            aliases=self._aliases,
            fairness=fairness,
            limits=self.limits,
            counters=self._counters,
            emit=emit,
            fingerprint=fingerprint,
        )
        self._admission = Admission(
            table=self._table,
            kv=self._kv,
            residency=self._residency,
            fairness=fairness,
            counters=self._counters,
            emit=emit,
        )
        self._scheduler = Scheduler(
            table=self._table, admission=self._admission, kv=self._kv, fairness=fairness, limits=self.limits
        )
        self._committer = Committer(
            table=self._table, kv=self._kv, fairness=fairness, counters=self._counters, emit=emit
        )
        self._executor = StepExecutor(
            runner,
            alive=lambda row: self._table.sequence(row.sequence_id) is not None,
            commit=self._commit,
            fail=lambda row, error: self._committer.fail(row, error, self._clock()),
        )
        self._ahead = runner.asynchronous if config.schedule_ahead is None else config.schedule_ahead
        self._flight: Launched | None = None
        self._stats_at = float("-inf")
        self._active = False
        self.stopping = False
        """Whether `Shutdown` was received: what is left is to flush the events."""
        self.stalled = False
        """Whether the last step launched nothing although requests wait (for a load or for room)."""

    @classmethod
    def serving(cls, config: EngineConfig, runner: Runner, ready: Ready) -> "Engine":
        """An engine over the base that `ready` describes.

        Args:
            config: Settings.
            runner: The device behind the step contract.
            ready: What `build_runner` found: fingerprint, longest sequence, vocabulary, the best prefill chunk.
        """
        tuned_chunk = ready.details.get("tuned_prefill_chunk")
        return cls(
            config,
            runner,
            fingerprint=ready.fingerprint,
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            tuned_chunk=None if tuned_chunk is None else int(tuned_chunk),
        )

    # --- commands --------------------------------------------------------------------------------------------------

    def handle(self, commands: Iterable[Command]) -> None:
        """Take commands in, in order; their answers come out of the next `step()`."""
        now = self._clock()
        for command in commands:
            self._handle(command, now)

    def _handle(self, command: Command, now: float) -> None:
        match command:
            case Add():
                refusal = Unavailable(Reason.DRAINING, "the engine is shutting down") if self.stopping else None
                self._table.arrive(command, now, refusal=refusal)
            case Abort(request_id=request_id):
                request = self._table.get(request_id)
                if request is not None:
                    self._table.end(request, "cancelled", now)
            case Stop():
                self._stop(command, now)
            case PutVersion(spec=spec):
                self._residency.put(spec)
            case DropVersion(version=version):
                self._residency.drop(version)
            case PutAlias(spec=alias):
                self._aliases.put(alias)
            case DropAlias(alias=name, revision=revision):
                self._aliases.drop(name, revision)
            case Preload(operation_id=operation_id, version=version):
                self._residency.preload(operation_id, version, now)
            case Unload(operation_id=operation_id, version=version):
                self._residency.unload(operation_id, version)
            case Ping():
                self._emit(Pong())
            case Shutdown():
                self.shut_down()

    def _stop(self, command: Stop, now: float) -> None:
        request = self._table.get(command.request_id)
        if request is None:
            return
        for sequence in list(request.alive):
            if sequence.choice == command.index:
                self._table.finish_sequence(request, sequence, "stop", now, tokens=max(0, command.tokens))

    def shut_down(self) -> None:
        """Cancel everything that is left; later requests are refused."""
        now = self._clock()
        self.stopping = True
        for request in self._table.requests():
            self._table.end(request, "cancelled", now)
        self._residency.cancel_operations()

    # --- steps -----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether another `step()` may do something without a new command."""
        return bool(self._events) or self._flight is not None or len(self._table) > 0 or self._residency.pending

    def next_timer(self) -> float | None:
        """Clock time at which a waiting request expires, None without one."""
        return self._table.next_timer()

    def step(self) -> list[Event]:
        """Bring one step to its commit if anything can run; returns the events since the last call, in order.

        Raises:
            Exception: Whatever the runner raises except `OutOfMemory`; the engine must not be used after it.
        """
        now = self._clock()
        self._active = self._active or self.has_work
        for version, error in self._residency.poll(now):
            self._admission.fail_waiting(version, error, now)
        self._table.expire(now)
        step = self._flight if self._flight is not None else self._launch(now)
        self.stalled = step is None and self.has_work
        if step is not None:
            self._flight = self._launch(now, behind=step.plan) if self._ahead else None
            self._counters.steps += 1
            self._counters.distinct_adapters = len({row.slot for row in step.plan.rows if row.slot >= 0})
            if self._executor.finish(step, self._flight):
                self._scheduler.ran_well()
            else:
                self._flight = None
                self._scheduler.ran_out_of_memory(step.plan)
            self._tell_runner()
        self._report(self._clock())
        events, self._events = self._events, []
        return events

    def _launch(self, now: float, *, behind: StepPlan | None = None) -> Launched | None:
        plan = self._scheduler.schedule(now, behind=behind)
        # Before the launch: it may use pages again that were freed since the last one.
        self._tell_runner()
        return None if plan is None else self._executor.launch(plan)

    def _commit(self, rows: Sequence[RowPlan], result: StepResult) -> None:
        self._counters.add_seconds(result.seconds)
        self._committer.commit(rows, result.rows, self._clock())

    def _tell_runner(self) -> None:
        for sequence_id in self._table.take_released():
            self._runner.release_sequence(sequence_id)
        if self._poison:
            freed = self._kv.pool.take_freed()
            if freed:
                self._runner.poison_pages(freed)

    def _report(self, now: float) -> None:
        busy = len(self._table) > 0 or self._residency.pending
        # A request may come and go within one step, or be refused before it: idle begins after that, too.
        turned_idle = self._active and not busy
        if turned_idle or (busy and now - self._stats_at >= STATS_INTERVAL):
            self._stats_at = now
            self._residency.report_references()
            self._emit(self.stats())
        self._active = busy

    def stats(self) -> Stats:
        """Gauges and counters now."""
        counters, pool, residency = self._counters, self._kv.pool, self._residency
        host = residency.host
        return Stats(
            waiting=len(self._table.waiting),
            running=len(self._table.running),
            kv_pages_used=pool.used,
            kv_pages_cached=pool.idle,
            kv_pages_total=pool.usable,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prefix_query_tokens=counters.prefix_query_tokens,
            rank_units_used=residency.rank_units_used,
            rank_units_total=self._runner.slab.rank_units,
            resident_versions=residency.resident,
            adapter_loads=residency.loads,
            adapter_evictions=residency.evictions,
            preemptions=counters.preemptions,
            steps=counters.steps,
            step_seconds=dict(counters.step_seconds),
            prefill_tokens=counters.prefill_tokens,
            decode_tokens=counters.decode_tokens,
            requests_finished=counters.requests_finished,
            requests_cancelled=counters.requests_cancelled,
            requests_failed=counters.requests_failed,
            distinct_adapters=counters.distinct_adapters,
            host_bytes_used=host.bytes_used,
            host_bytes_total=host.bytes_total,
            host_hits=host.hits,
            host_misses=host.misses,
            host_prefetches=host.prefetches,
        )

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def check_integrity(self) -> None:
        """Assert the invariants of pages, prefix cache, slots, references and queues; made for tests."""
        self._table.check_integrity()
