"""A runner without tensors that notices wrong pages and wrong slots.

It keeps a KV "memory" by page and offset, in which every computed token leaves (token id, adapter path). A row's next
token is a hash of what is *read back* through its page table, after asserting that this equals the row's history under
the row's adapter. So a stale, poisoned, shared or overwritten page fails at once, and the tokens of a request depend on
nothing but (history, adapter, seed, choice): `solo_output` computes them without an engine.
"""

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.messages import Ready, SamplingSpec, TokenLogprob
from loramux_server.engine.plan import HostUse, OutOfMemory, RowPlan, RowResult, StepPlan, StepResult

VOCAB_SIZE = 64

Cell = tuple[int, str] | None


def next_token(history: Sequence[int], path: str, sampling: SamplingSpec, choice: int, prompt_length: int) -> int:
    """The token after `history`; end tokens are masked until `min_tokens` are out."""
    text = f"{list(history)}|{path}|{sampling.seed}|{choice}|{len(history)}"
    token = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % VOCAB_SIZE
    if len(history) - prompt_length + 1 < sampling.min_tokens:
        end = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else sampling.eos_token_ids)}
        while token in end:
            token = (token + 1) % VOCAB_SIZE
    return token


def solo_output(prompt: Sequence[int], sampling: SamplingSpec, path: str, choice: int) -> list[int]:
    """What one sequence gives when nothing else happens."""
    history = list(prompt)
    end = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else sampling.eos_token_ids)}
    while len(history) - len(prompt) < sampling.max_tokens:
        history.append(next_token(history, path, sampling, choice, len(prompt)))
        if history[-1] in end:
            break
    return history[len(prompt) :]


@dataclasses.dataclass
class _Load:
    slot: int
    path: str
    polls_left: int


class FakeSlab:
    """Rank units as a list of owners; a load takes `delay` polls and may fail.

    Args:
        rank_units: Capacity.
        max_slots: Slots.
        units: Rank units by path; 1 for a path not named.
        delay: Polls until a load ends.
        reading: Times that the size of a version is asked in vain before it is known.
        host_size: Host memory; 0 = none.

    `hinted` has the hints in order; what is hinted or loaded is in `host` from then on, until a test or `forget` takes
    it out.
    """

    def __init__(
        self,
        *,
        rank_units: int,
        max_slots: int,
        units: dict[str, int] | None = None,
        delay: int = 0,
        reading: int = 0,
        host_size: int = 0,
    ) -> None:
        self.host_size = host_size
        self._rank_units = rank_units
        self._max_slots = max_slots
        self.units = dict(units or {})
        self.delay = delay
        self.reading = reading
        self.asked: Counter[str] = Counter()
        self.failing: dict[str, Exception] = {}
        self.unreadable: dict[str, Exception] = {}
        self.started: list[str] = []
        self.hinted: list[str] = []
        self.prefetches = 0
        self.forgotten: list[str] = []
        self.host: set[str] = set()
        self._host_changes: list[str] = []
        self._rows: list[str | None] = [None] * rank_units
        self._table: dict[int, tuple[int, int, str]] = {}
        self._loads: list[_Load] = []

    @property
    def rank_units(self) -> int:
        return self._rank_units

    @property
    def max_slots(self) -> int:
        return self._max_slots

    def units_of(self, version_path: str) -> int | None:
        self.asked[version_path] += 1
        if self.asked[version_path] <= self.reading:
            return None
        if version_path in self.unreadable:
            raise self.unreadable[version_path]
        return self.units.get(version_path, 1)

    def start_load(self, slot: int, first_unit: int, units: int, version_path: str) -> None:
        assert 0 <= slot < self._max_slots and slot not in self._table, f"slot {slot} is taken"
        assert first_unit >= 0 and first_unit + units <= self._rank_units, "rows outside the slab"
        for other, (first, count, _) in self._table.items():
            assert first + count <= first_unit or first_unit + units <= first, f"rows of slot {other} overwritten"
        self._table[slot] = (first_unit, units, version_path)
        self._rows[first_unit : first_unit + units] = [None] * units
        self.started.append(version_path)
        self.keep(version_path)
        self._loads.append(_Load(slot, version_path, self.delay))

    def poll_loads(self) -> list[tuple[int, Exception | None]]:
        ended: list[tuple[int, Exception | None]] = []
        for load in list(self._loads):
            load.polls_left -= 1
            if load.polls_left >= 0:
                continue
            self._loads.remove(load)
            error = self.failing.get(load.path)
            if error is None:
                first, units, path = self._table[load.slot]
                self._rows[first : first + units] = [path] * units
            ended.append((load.slot, error))
        return ended

    def clear(self, slot: int) -> None:
        assert slot in self._table, f"slot {slot} is empty"
        assert all(load.slot != slot for load in self._loads), f"slot {slot} cleared while loading"
        first, units, _ = self._table.pop(slot)
        self._rows[first : first + units] = [None] * units

    def prefetch(self, version_path: str) -> None:
        self.hinted.append(version_path)
        self.prefetches += bool(self.host_size) and version_path not in self.host
        self.keep(version_path)

    def forget(self, version_path: str) -> None:
        self.forgotten.append(version_path)
        self.lose(version_path)

    def in_host(self, version_path: str) -> bool:
        return version_path in self.host

    def poll_host(self) -> list[str]:
        changes, self._host_changes = self._host_changes, []
        return changes

    def host_use(self) -> HostUse:
        return HostUse(bytes_used=len(self.host), bytes_total=self.host_size, prefetches=self.prefetches)

    def keep(self, version_path: str) -> None:
        """Put a version into host memory, if there is any."""
        if self.host_size and version_path not in self.host:
            self.host.add(version_path)
            self._host_changes.append(version_path)

    def lose(self, version_path: str) -> None:
        """Take a version out of host memory."""
        if version_path in self.host:
            self.host.remove(version_path)
            self._host_changes.append(version_path)

    def read(self, slot: int) -> str:
        """Path of the adapter in a slot, proved by its rows; "" for the base."""
        if slot == -1:
            return ""
        first, units, path = self._table[slot]
        assert self._rows[first : first + units] == [path] * units, f"rows of slot {slot} are not those of its adapter"
        return path

    @property
    def resident(self) -> dict[int, str]:
        return {slot: path for slot, (_, _, path) in self._table.items()}


@dataclasses.dataclass
class _Handle:
    """Steps run when they are launched, in that order, as on a device; their outcome shows later."""

    outcome: StepResult | OutOfMemory

    def result(self) -> StepResult:
        if isinstance(self.outcome, OutOfMemory):
            raise self.outcome
        return self.outcome


class FakeRunner:
    """See the module.

    Args:
        num_pages: Pages including page 0.
        page_size: Tokens a page.
        slab: Adapter rows.
        token_capacity: A step with more tokens runs out of memory; None = never.
    """

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        slab: FakeSlab | None = None,
        token_capacity: int | None = None,
    ) -> None:
        self._slab = slab if slab is not None else FakeSlab(rank_units=8, max_slots=8)
        self._num_pages = num_pages
        self._page_size = page_size
        self.token_capacity = token_capacity
        self.out_of_memory: Callable[[StepPlan], bool] = lambda plan: False
        self.non_finite_paths: set[str] = set()
        self.broken: Exception | None = None
        self.plans: list[StepPlan] = []
        self.poisoned = 0
        self.live_sequences: set[int] = set()
        self._kv: list[list[Cell]] = [[None] * page_size for _ in range(num_pages)]
        self._failed_step = 0
        self._sampled: list[int | None] = []

    @property
    def asynchronous(self) -> bool:
        # Tests that count steps want one after the other; those of scheduling ahead say `schedule_ahead=True`.
        return False

    @property
    def slab(self) -> FakeSlab:
        return self._slab

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def ready(self) -> Ready:
        return Ready(
            fingerprint="fake",
            max_model_len=(self._num_pages - 1) * self._page_size,
            vocab_size=VOCAB_SIZE,
            device="cpu",
            weights="nf4",
            resident_weight_bytes=0,
            kv_pages=self._num_pages - 1,
            page_size=self._page_size,
            rank_units=self._slab.rank_units,
            max_rank=64,
        )

    def launch(self, plan: StepPlan) -> _Handle:
        if plan.behind and plan.behind == self._failed_step:
            return _Handle(OutOfMemory())
        assert plan.behind or all(row.source == -1 for row in plan.rows), "a token is taken from no step"
        try:
            result = self._run(self._with_tokens(plan))
        except OutOfMemory as error:
            self._failed_step = plan.step
            return _Handle(error)
        self._sampled = [row.token_id for plan_row, row in zip(plan.rows, result.rows, strict=True) if plan_row.sample]
        return _Handle(result)

    def _with_tokens(self, plan: StepPlan) -> StepPlan:
        """The plan with the tokens that the step before has sampled."""
        return dataclasses.replace(plan, rows=[self._with_token(row) for row in plan.rows])

    def _with_token(self, row: RowPlan) -> RowPlan:
        if row.source < 0:
            return row
        token = self._sampled[row.source]
        assert token is not None and len(row.token_ids) == 1 and row.start == len(row.history)
        return dataclasses.replace(row, token_ids=[token], history=[*row.history, token])

    def release_sequence(self, sequence_id: int) -> None:
        self.live_sequences.discard(sequence_id)

    def poison_pages(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._kv[page] = [None] * self._page_size
            self.poisoned += 1

    def _run(self, plan: StepPlan) -> StepResult:
        if self.broken is not None:
            raise self.broken
        assert plan.rows, "an empty step"
        too_large = self.token_capacity is not None and plan.num_tokens > self.token_capacity
        if too_large or self.out_of_memory(plan):
            raise OutOfMemory
        self.plans.append(plan)
        for copy in plan.copies:
            assert copy.source != copy.target and 0 not in (copy.source, copy.target)
            self._kv[copy.target] = self._kv[copy.source][: copy.tokens] + [None] * (self._page_size - copy.tokens)
        self._write(plan)
        return StepResult(rows=[self._read(plan, index) for index in range(len(plan.rows))], seconds={"forward": 0.001})

    def _write(self, plan: StepPlan) -> None:
        written: set[tuple[int, int]] = set()
        for row in plan.rows:
            path = self._slab.read(row.slot)
            assert len(row.pages) * self._page_size >= row.start + len(row.token_ids), "a row lacks pages"
            for offset, token in enumerate(row.token_ids):
                page, place = divmod(row.start + offset, self._page_size)
                cell = (row.pages[page], place)
                assert cell[0] != 0, "a row writes to the trash page"
                assert cell not in written, f"two rows of one step write page {cell[0]} offset {cell[1]}"
                written.add(cell)
                self._kv[cell[0]][place] = (token, path)

    def _read(self, plan: StepPlan, index: int) -> RowResult:
        row = plan.rows[index]
        self.live_sequences.add(row.sequence_id)
        path = self._slab.read(row.slot)
        length = row.start + len(row.token_ids)
        context = [self._kv[row.pages[p // self._page_size]][p % self._page_size] for p in range(length)]
        expected = [(token, path) for token in row.history[:length]]
        assert context == expected, f"sequence {row.sequence_id} reads {context}, its history is {expected}"
        assert row.position == length
        logprobs = tuple(TokenLogprob(logprob=-float(target)) for target in row.prompt_targets)
        if row.prompt_logprobs is not None:
            assert list(row.prompt_targets) == list(row.history[row.start + 1 :][: len(row.prompt_targets)])
        if not row.sample:
            return RowResult(token_id=None, prompt_logprobs=logprobs)
        assert row.sampling is not None and length == len(row.history), "sampled before the end of the sequence"
        if path in self.non_finite_paths:
            return RowResult(token_id=0, finite=False)
        token = next_token(row.history[:length], path, row.sampling, row.choice, row.prompt_length)
        logprob = TokenLogprob(logprob=-1.0) if row.sampling.logprobs is not None else None
        return RowResult(token_id=token, logprob=logprob, prompt_logprobs=logprobs)


class SlowRunner(FakeRunner):
    """Takes `seconds` a step, so that a test can act while a request runs."""

    def __init__(self, *, seconds: float, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages=num_pages, page_size=page_size)
        self._seconds = seconds

    def _run(self, plan: StepPlan) -> StepResult:
        time.sleep(self._seconds)
        return super()._run(plan)


def build_fake_runner(config: EngineConfig) -> FakeRunner:
    """Stands in for `runner.build_runner` in a real engine process."""
    return SlowRunner(seconds=0.002, num_pages=(config.kv_pages or 255) + 1, page_size=config.page_size)
