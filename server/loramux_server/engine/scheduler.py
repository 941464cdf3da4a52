"""What runs in the next step: decode rows first, then prefill chunks, then newly admitted requests.

Deterministic and without tensors. A step takes at most `max_running` rows and `max_batch_tokens` tokens. A request of n
sequences is prefilled once, up to the last prompt token; then its pages are forked and each sequence computes that
token for itself. When a running sequence finds no page, running requests are preempted: of the key served most, the
lowest priority, the newest first; they are recomputed later.
"""

import logging

from loramux_server.engine.admission import Admission
from loramux_server.engine.fairness import FairnessPolicy
from loramux_server.engine.kv import KvCache
from loramux_server.engine.limits import Limits
from loramux_server.engine.plan import PageCopy, RowPlan, StepPlan
from loramux_server.engine.request import Phase, Request
from loramux_server.engine.request_table import RequestTable
from loramux_server.engine.sequence import Sequence

logger = logging.getLogger(__name__)

_CALM_STEPS = 16
"""Steps without running out of memory after which the token budget doubles again."""


class Scheduler:
    """Plans steps.

    Args:
        table: Requests.
        admission: Who may start.
        kv: Pages.
        fairness: Whom preemption takes from.
        limits: Rows and tokens a step.
    """

    def __init__(
        self,
        *,
        table: RequestTable,
        admission: Admission,
        kv: KvCache,
        fairness: FairnessPolicy,
        limits: Limits,
    ) -> None:
        self._table = table
        self._admission = admission
        self._kv = kv
        self._fairness = fairness
        self._limits = limits
        self._steps = 0
        self._behind: dict[int, int] = {}
        self._prefill_budget = limits.max_batch_tokens
        self._short_of_memory = False
        self._calm = 0

    def schedule(self, now: float, *, behind: StepPlan | None = None) -> StepPlan | None:
        """The next step, or None when nothing can run now.

        Args:
            now: Monotonic seconds.
            behind: The launched step whose results are not in yet. Nothing is preempted then; None is also the answer
                when the results have to come first.
        """
        if behind is None:
            return self._plan(now, 0)
        marked = self._mark(behind)
        try:
            if self._must_wait():
                return None
            return self._plan(now, behind.step)
        finally:
            self._behind = {}
            for sequence in marked:
                sequence.in_flight = sequence.pending = 0

    def _mark(self, behind: StepPlan) -> list[Sequence]:
        """Set what the launched step will have done to its sequences, as far as it is known."""
        marked: list[Sequence] = []
        sampled = 0
        for row in behind.rows:
            entry = self._table.sequence(row.sequence_id)
            if entry is not None:
                request, sequence = entry
                # What goes on from the pending token counts on it being the only one that the host does not know.
                assert not row.sample or row.position == len(sequence.tokens), "two tokens of a sequence are late"
                sequence.in_flight = len(row.token_ids)
                if row.sample and sequence.output_length + 1 < request.max_tokens:
                    sequence.pending = 1
                    self._behind[row.sequence_id] = sampled
                marked.append(sequence)
            sampled += row.sample
        return marked

    def _must_wait(self) -> bool:
        """Whether pages would have to be taken from somebody."""
        return sum(self._cost(request) for request in self._table.running) > self._kv.pool.available

    def _plan(self, now: float, behind: int) -> StepPlan | None:
        self._give_pages()
        decode: list[RowPlan] = []
        prefill: list[RowPlan] = []
        copies: list[PageCopy] = []
        partial: list[Request] = []
        width = 0
        for request in self._table.running:
            width += len(request.alive)
            up_to_date = request.forked
            for sequence in request.alive:
                if request.forked and sequence.remaining == 1:
                    decode.append(self._row(request, sequence, 1, copies))
                else:
                    up_to_date = False
            if not up_to_date:
                partial.append(request)
        budget = min(self._limits.max_batch_tokens - len(decode), self._prefill_budget)
        for request in partial:
            budget -= self._prefill(request, budget, prefill, copies, decoding=True)
        rows = self._limits.max_running - width
        if budget > 0 and rows > 0:
            for request in self._admission.admit(rows=rows, now=now):
                self._fork_when_ready(request)
                budget -= self._prefill(request, budget, prefill, copies, decoding=False)
                if budget <= 0:
                    break
        if not decode and not prefill:
            return None
        self._steps += 1
        return StepPlan(step=self._steps, rows=decode + prefill, copies=copies, behind=behind)

    def ran_out_of_memory(self, plan: StepPlan) -> None:
        """Plan smaller prefills for a while: the device had no room for this step."""
        if not self._short_of_memory:
            # Once a spell: while it lasts, every step may run out again.
            self._short_of_memory = True
            logger.warning("out of memory in a step of %d rows, %d tokens", len(plan.rows), plan.num_tokens)
        prefill = sum(len(row.token_ids) for row in plan.rows if len(row.token_ids) > 1)
        if prefill:
            self._prefill_budget = max(1, min(self._prefill_budget, prefill) // 2)
        self._calm = 0

    def ran_well(self) -> None:
        """A whole step succeeded at the first attempt."""
        if self._short_of_memory:
            self._calm += 1
            if self._calm >= _CALM_STEPS:
                self._calm = 0
                self._prefill_budget = min(2 * self._prefill_budget, self._limits.max_batch_tokens)
                self._short_of_memory = self._prefill_budget < self._limits.max_batch_tokens

    # --- pages of running requests ---------------------------------------------------------------------------------

    def _give_pages(self) -> None:
        for request in list(self._table.running):
            if request.forked and not any(map(self._kv.missing, request.alive)):
                continue
            if request.phase is not Phase.RUNNING or not self._make_room(request):
                continue
            self._fork_when_ready(request)
            for sequence in request.alive if request.forked else request.alive[:1]:
                self._kv.grow(sequence)

    def _make_room(self, request: Request) -> bool:
        while self._cost(request) > self._kv.pool.available:
            victim = max(self._table.running, key=self._preemption_rank)
            self._table.preempt(victim)
            if victim is request:
                return False
        return True

    def _cost(self, request: Request) -> int:
        alive = request.alive
        if request.forked:
            return sum(self._kv.missing(sequence) for sequence in alive)
        lead = alive[0]
        cost = self._kv.missing(lead)
        if self._ready_to_fork(request):
            cost += sum(self._kv.fork_cost(lead, sequence) for sequence in alive[1:])
        return cost

    def _preemption_rank(self, request: Request) -> tuple[float, int, int]:
        return (self._fairness.served(request.add.fairness_key), -request.add.priority, request.admitted_order)

    def _ready_to_fork(self, request: Request) -> bool:
        alive = request.alive
        if request.forked:
            return False
        return len(alive) == 1 or (alive[0].computed == request.prompt_length - 1 and not alive[0].in_flight)

    def _fork_when_ready(self, request: Request) -> None:
        if self._ready_to_fork(request):
            lead, *others = request.alive
            for sequence in others:
                self._kv.fork(lead, sequence)
            request.forked = True

    # --- rows ------------------------------------------------------------------------------------------------------

    def _prefill(
        self, request: Request, budget: int, rows: list[RowPlan], copies: list[PageCopy], *, decoding: bool
    ) -> int:
        """Add rows for what a request has yet to compute; `decoding` = except its decode rows."""
        used = 0
        for sequence in request.alive if request.forked else request.alive[:1]:
            if decoding and request.forked and sequence.remaining == 1:
                continue
            until = sequence.length if request.forked else request.prompt_length - 1
            chunk = min(until - sequence.launched_tokens, self._limits.prefill_chunk, budget - used)
            if chunk > 0:
                rows.append(self._row(request, sequence, chunk, copies))
                used += chunk
        return used

    def _row(self, request: Request, sequence: Sequence, chunk: int, copies: list[PageCopy]) -> RowPlan:
        start = sequence.launched_tokens
        end = start + chunk
        sampling = request.add.sampling
        sample = request.forked and end == sequence.length
        # A pending token is always computed alone: it is the one token that a decode row has left.
        late = end > len(sequence.tokens)
        assert not late or chunk == 1, "a row mixes known tokens with a pending one"
        asked: int | None = None
        targets: list[int] = []
        if sampling.prompt_logprobs is not None and request.owes_prompt_logprobs and sequence is request.alive[0]:
            targets = sequence.tokens[start + 1 : min(end + 1, sequence.prompt_length)]
            asked = sampling.prompt_logprobs if targets else None
        if sequence.pending_copy is not None and not sequence.in_flight:
            copies.append(sequence.pending_copy)
        sequence.launched = True
        return RowPlan(
            sequence_id=sequence.sequence_id,
            token_ids=(0,) if late else sequence.tokens[start:end],
            start=start,
            pages=sequence.pages[: self._kv.pages_for(end)],
            slot=request.slot,
            sample=sample,
            sampling=sampling if sample or asked is not None else None,
            choice=sequence.choice,
            position=end,
            history=sequence.tokens,
            prompt_length=sequence.prompt_length,
            prompt_logprobs=asked,
            prompt_targets=targets,
            source=self._behind[sequence.sequence_id] if late else -1,
        )
