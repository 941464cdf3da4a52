"""Running planned steps one ahead of their results, and in smaller pieces when the device has no room.

While the results of a step are on their way, the one behind it is launched already, so the device never waits for the
host between two steps.

A step is idempotent until it is committed, so after `OutOfMemory` its rows are launched again: decode rows together
(halved when even that does not fit), then prefill chunks one request at a time, each halved until it fits. Only a chunk
that fails alone at one token, or a decode row that fails alone, fails its request.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

from loramux_server.engine.messages import ErrorSpec
from loramux_server.engine.plan import OutOfMemory, RowPlan, Runner, StepHandle, StepPlan, StepResult
from loramux_server.errors import Reason

_NO_ROOM = ErrorSpec(
    reason=Reason.OUT_OF_MEMORY.value,
    message="the device ran out of memory for this request alone",
    retry_after=1.0,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Launched:
    """A step on the device whose results are not taken in yet."""

    plan: StepPlan
    handle: StepHandle


class StepExecutor:
    """Launches plans and brings them to their commit.

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

    def launch(self, plan: StepPlan) -> Launched:
        """Start a step behind those launched before."""
        return Launched(plan, self._runner.launch(plan))

    def finish(self, launched: Launched, behind: Launched | None = None) -> bool:
        """Bring a step to its commit.

        Args:
            launched: The oldest step on the device.
            behind: The one behind it; dropped when the older one did not go through whole.

        Returns:
            Whether it went through whole.
        """
        plan = launched.plan
        try:
            result = launched.handle.result()
        except OutOfMemory:
            if behind is not None:
                self._drop(behind)
        else:
            self._commit(plan.rows, result)
            return True
        rows = [self._known(row) for row in plan.rows if self._alive(row)]
        decode = [row for row in rows if len(row.token_ids) == 1]
        prefill = [row for row in rows if len(row.token_ids) > 1]
        if decode:
            self._halve_rows(plan, decode)
        for row in prefill:
            self._halve_chunk(plan, row)
        return False

    @staticmethod
    def _drop(launched: Launched) -> None:
        """Wait for a step that was built on one that did not happen."""
        with contextlib.suppress(OutOfMemory):
            launched.handle.result()

    @staticmethod
    def _known(row: RowPlan) -> RowPlan:
        """The row with its token: the step before, which samples it, is committed by now."""
        if row.source < 0:
            return row
        return dataclasses.replace(row, token_ids=[row.history[row.start]], source=-1)

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
        # The whole step was refused already: a step of this row alone need not be tried as it is.
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
