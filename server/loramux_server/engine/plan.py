"""The step contract between scheduler and runner.

    plan = scheduler.schedule()
    handle = runner.launch(plan)
    scheduler.commit(plan, handle.result())

One step may be planned and launched *behind* another, before that one's results are in: its rows then take the token
that the step before samples on the device. If the step before fails, so does the one behind it.

A plan holds plain Python values only: no tensors, no clocks. A step is idempotent until `commit`: a failed or dropped
step may be planned and launched again, because it writes only to pages and rows that the plan's sequences own.

The scheduler gives pages, slots and slab rows to others as soon as it knows that their owner has ended, even while a
launched step still has a row of that owner. So whatever a runner is told to do (launch, poison, clear, load, release)
must happen on the device after the steps that were launched before; staging buffers are the runner's own to guard.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from loramux_server.engine.messages import SamplingSpec, TokenLogprob


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """Work on one sequence in one step: tokens `[start, start + len(token_ids))` enter the KV cache.

    Attributes:
        sequence_id: Small integer, unique while the sequence lives; keys what a runner keeps of it (token counts).
        token_ids: Tokens computed now (a prefill chunk, or the last sampled token); one placeholder if `source` is set.
        source: Index, among the sampled rows of the step before, of the row whose token is this row's only token; -1 =
            `token_ids` are known.
        start: Position of the first of them = KV length before the step.
        pages: Page numbers covering positions `[0, start + len(token_ids))`, in order. Page 0 is never among them.
        slot: Slab slot of the adapter, -1 for the base.
        sample: Whether the last row's logits are sampled (False for an inner prefill chunk).
        sampling: The request's sampling; None only when neither sampled nor prompt log-probabilities are asked.
        choice: Index of the sequence in its request (counter of the random numbers).
        position: Position of the token to be sampled = start + len(token_ids).
        history: All token ids known so far (prompt + output), for penalties and bad words; a live view, do not keep. It
            lacks the token of `source`, and only that one: `position` = its length, and one more if `source` is set.
        prompt_length: Prompt tokens in `history`.
        prompt_logprobs: k when this chunk must give log-probabilities of the tokens that follow each of its tokens.
        prompt_targets: Those following tokens; as many as `token_ids`, one less at the prompt's end.
    """

    sequence_id: int
    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    slot: int
    sample: bool
    sampling: SamplingSpec | None
    choice: int
    position: int
    history: Sequence[int]
    prompt_length: int
    prompt_logprobs: int | None = None
    prompt_targets: Sequence[int] = ()
    source: int = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PageCopy:
    """Copy-on-write of a partial page before the step: KV of the first `tokens` positions of `source` to `target`."""

    source: int
    target: int
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step: rows in packed order, decode rows first.

    Attributes:
        step: Counter.
        rows: At least one.
        copies: Page copies that happen before the forward pass.
        behind: The step launched before this one whose results were not in when this was planned; 0 = none.
    """

    step: int
    rows: Sequence[RowPlan]
    copies: Sequence[PageCopy] = ()
    behind: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed batch."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What a row gave.

    Attributes:
        token_id: Sampled token, None if the row was not sampled.
        logprob: Set when the request asked for log-probabilities.
        finite: False when logits of the row hold NaN or Inf: `token_id` and log-probabilities mean nothing then.
        prompt_logprobs: One entry a prompt target, when asked.
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    finite: bool = True
    prompt_logprobs: Sequence[TokenLogprob] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Results in the order of the plan's rows, and seconds by part (`forward`, `sample`, ...)."""

    rows: Sequence[RowResult]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


class OutOfMemory(Exception):
    """The device had no room for this step; nothing was committed and the step may be planned again, smaller."""


class StepHandle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and fetch its results (one small copy).

        Raises:
            OutOfMemory: The step did not run.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostUse:
    """Host memory that keeps adapters between store and slab.

    Attributes:
        bytes_used: Bytes taken.
        bytes_total: Bytes in all; 0 = there is none.
        hits: Loads that found their adapter there.
        misses: Loads that waited for the store.
        prefetches: Adapters that were read before a load asked for them.
    """

    bytes_used: int = 0
    bytes_total: int = 0
    hits: int = 0
    misses: int = 0
    prefetches: int = 0


class SlabView(Protocol):
    """Slab as the scheduler's residency needs it: rank units, no tensors. Implemented by the runner.

    Loading may be asynchronous: `start_load` returns at once and `poll_loads` reports what ended since the last call.
    Between store and slab there may be host memory, whose content is the runner's own affair: it takes hints.
    """

    @property
    def rank_units(self) -> int:
        """Capacity in units of 16 rank rows."""
        ...

    @property
    def max_slots(self) -> int:
        """Largest number of adapters resident at once."""
        ...

    def units_of(self, version_path: str) -> int | None:
        """Rank units that the version at this directory needs; None while its files are being read: ask again.

        Never blocks. A refusal is told once: asked again later, the files are read again.

        Raises:
            LoramuxServerError: Unreadable or incompatible adapter.
        """
        ...

    def start_load(self, slot: int, first_unit: int, units: int, version_path: str) -> None:
        """Begin to fill rows `[first_unit, first_unit + units)` and describe them as `slot`.

        Nothing is written before the steps launched before the last `clear` are over: they may read these rows.
        """
        ...

    def poll_loads(self) -> list[tuple[int, Exception | None]]:
        """Slots whose load ended since the last call, with the error if it failed."""
        ...

    def clear(self, slot: int) -> None:
        """Forget a slot, for steps launched from now on: its table entry becomes rank 0, others may get its rows."""
        ...

    def prefetch(self, version_path: str) -> None:
        """Hint that a version will be loaded soon. Never blocks, may be dropped, and fails nothing."""
        ...

    def forget(self, version_path: str) -> None:
        """Keep nothing of a version in host memory: it will not be loaded any more."""
        ...

    def in_host(self, version_path: str) -> bool:
        """Whether a load of the version would find it in host memory."""
        ...

    def poll_host(self) -> list[str]:
        """Paths of versions whose `in_host` may have changed since the last call."""
        ...

    def host_use(self) -> HostUse:
        """Gauges and counters of host memory."""
        ...


class Runner(Protocol):
    """Everything with a tensor in it, behind the step contract."""

    @property
    def slab(self) -> SlabView:
        """Adapter residency on the device."""
        ...

    @property
    def num_pages(self) -> int:
        """KV pages including page 0, the trash page."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        ...

    @property
    def asynchronous(self) -> bool:
        """Whether `launch` returns before the step is over."""
        ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Start a step; steps run in the order of their launches."""
        ...

    def release_sequence(self, sequence_id: int) -> None:
        """Drop per-sequence device state."""
        ...

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Fill freed pages with NaN (debug mode, used by tests to prove that nothing reads them)."""
        ...
