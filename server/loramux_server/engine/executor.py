"""Running a planned step, and running it in smaller pieces when the device has no room for it.

A step is idempotent until it is committed, so after `OutOfMemory` its rows are launched again: decode rows together
(halved when even that does not fit), then prefill chunks one request at a time, each halved until it fits. Only a chunk
that fails alone at one token, or a decode row that fails alone, fails its request.
"""

import dataclasses
from collections.abc import Callable, Sequence

from loramux_server.engine.messages import ErrorSpec
from loramux_server.engine.plan import OutOfMemory, RowPlan, Runner, StepPlan, StepResult
from loramux_server.errors import Reason

_NO_ROOM = ErrorSpec(
    reason=Reason.OUT_OF_MEMORY.value,
    message="the device ran out of memory for this request alone",
    retry_after=1.0,
)


class StepExecutor:
    """Launches plans.

    Args:
        runner: The device.
        alive: Whether a row's sequence still lives.
        commit: Takes rows as launched and their result.
        fail: Takes a row whose request cannot run, and why.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        alive: Callable[[RowPlan], bool],
        commit: Callable[[Sequence[RowPlan], StepResult], None],
        fail: Callable[[RowPlan, ErrorSpec], None],
    ) -> None:
        self._runner = runner
        self._alive = alive
        self._commit = commit
        self._fail = fail

    def execute(self, plan: StepPlan) -> bool:
        """Run a step to its commit; returns whether it went through whole."""
        if self._attempt(plan):
            return True
        decode = [row for row in plan.rows if len(row.token_ids) == 1]
        prefill = [row for row in plan.rows if len(row.token_ids) > 1]
        if decode:
            self._halve_rows(plan, decode)
        for row in prefill:
            self._halve_chunk(plan, row)
        return False

    def _attempt(self, plan: StepPlan) -> bool:
        try:
            result = self._runner.launch(plan).result()
        except OutOfMemory:
            return False
        self._commit(plan.rows, result)
        return True

    def _part(self, plan: StepPlan, rows: Sequence[RowPlan]) -> StepPlan:
        pages = {page for row in rows for page in row.pages}
        return StepPlan(step=plan.step, rows=rows, copies=[copy for copy in plan.copies if copy.target in pages])

    def _halve_rows(self, plan: StepPlan, rows: list[RowPlan]) -> None:
        rows = [row for row in rows if self._alive(row)]
        if not rows or self._attempt(self._part(plan, rows)):
            return
        if len(rows) == 1:
            self._fail(rows[0], _NO_ROOM)
            return
        middle = len(rows) // 2
        self._halve_rows(plan, rows[:middle])
        self._halve_rows(plan, rows[middle:])

    def _halve_chunk(self, plan: StepPlan, row: RowPlan) -> None:
        refused = len(plan.rows) == 1
        while self._alive(row):
            if not refused and self._attempt(self._part(plan, [row])):
                return
            refused = False
            count = len(row.token_ids) // 2
            if count == 0:
                self._fail(row, _NO_ROOM)
                return
            # The rest of the chunk is planned again in the next step.
            targets = row.prompt_targets[:count]
            row = dataclasses.replace(
                row,
                token_ids=row.token_ids[:count],
                sample=False,
                position=row.start + count,
                prompt_logprobs=row.prompt_logprobs if targets else None,
                prompt_targets=targets,
            )
