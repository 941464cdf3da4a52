"""Fault points for tests of failure handling, switched on by the environment variable `LORAMUX_FAULT`.

The value is a comma-separated list of `name:argument`:

- `oom_prefill:<n>`: the nth launch that holds a prefill chunk runs out of memory (counted from 1);
- `die_after_steps:<n>`: the launch after n good ones raises;
- `slow_step:<ms>`: every launch takes so much longer;
- `load_fail:<text>`: loading an adapter whose path contains the text fails.

Off by default; when on, the engine says so at every start, at WARNING.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence

from loramux_server.engine.plan import OutOfMemory, Runner, SlabView, StepHandle, StepPlan, StepResult

VARIABLE = "LORAMUX_FAULT"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong on purpose."""

    oom_prefill: int | None = None
    die_after_steps: int | None = None
    slow_step: float = 0.0
    load_fail: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Faults":
        """Read the variable's value.

        Raises:
            ValueError: Unknown name or bad argument.
        """
        faults = cls()
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, argument = item.partition(":")
            if name == "oom_prefill":
                faults = dataclasses.replace(faults, oom_prefill=int(argument))
            elif name == "die_after_steps":
                faults = dataclasses.replace(faults, die_after_steps=int(argument))
            elif name == "slow_step":
                faults = dataclasses.replace(faults, slow_step=float(argument) / 1000)
            elif name == "load_fail" and argument:
                faults = dataclasses.replace(faults, load_fail=argument)
            else:
                raise ValueError(f"{VARIABLE}: {item!r} is not a fault point")
        return faults


class _FailedHandle:
    def result(self) -> StepResult:
        raise OutOfMemory("fault point oom_prefill")


class _FaultySlab:
    def __init__(self, slab: SlabView, needle: str) -> None:
        self._slab = slab
        self._needle = needle
        self._failing: set[int] = set()

    @property
    def rank_units(self) -> int:
        return self._slab.rank_units

    @property
    def max_slots(self) -> int:
        return self._slab.max_slots

    def units_of(self, version_path: str) -> int | None:
        return self._slab.units_of(version_path)

    def start_load(self, slot: int, first_unit: int, units: int, version_path: str) -> None:
        # The load itself runs, so that the slot is in the state that a failed load leaves.
        if self._needle in version_path:
            self._failing.add(slot)
        self._slab.start_load(slot, first_unit, units, version_path)

    def poll_loads(self) -> list[tuple[int, Exception | None]]:
        ended = self._slab.poll_loads()
        fault = OSError("fault point load_fail")
        result = [(slot, fault if slot in self._failing else error) for slot, error in ended]
        self._failing.difference_update(slot for slot, _ in ended)
        return result

    def clear(self, slot: int) -> None:
        self._slab.clear(slot)


class FaultyRunner:
    """A runner with faults; everything else passes through.

    Args:
        runner: The real one.
        faults: What goes wrong.
    """

    def __init__(self, runner: Runner, faults: Faults) -> None:
        logger.warning("fault points are on: %s", faults)
        self._runner = runner
        self._faults = faults
        needle = faults.load_fail
        self._slab: SlabView = runner.slab if needle is None else _FaultySlab(runner.slab, needle)
        self._launches = 0
        self._failed_step = 0
        self._prefills = 0

    @property
    def slab(self) -> SlabView:
        """The slab, faulty if asked."""
        return self._slab

    @property
    def num_pages(self) -> int:
        """Passed through."""
        return self._runner.num_pages

    @property
    def page_size(self) -> int:
        """Passed through."""
        return self._runner.page_size

    @property
    def asynchronous(self) -> bool:
        """Passed through."""
        return self._runner.asynchronous

    def launch(self, plan: StepPlan) -> StepHandle:
        """Launch, unless it is time for a fault.

        Raises:
            RuntimeError: Fault point `die_after_steps`.
        """
        self._launches += 1
        limit = self._faults.die_after_steps
        if limit is not None and self._launches > limit:
            raise RuntimeError("fault point die_after_steps")
        if self._faults.slow_step:
            time.sleep(self._faults.slow_step)
        if any(len(row.token_ids) > 1 for row in plan.rows):
            self._prefills += 1
            if self._prefills == self._faults.oom_prefill:
                self._failed_step = plan.step
                return _FailedHandle()
        if plan.behind and plan.behind == self._failed_step:
            return _FailedHandle()
        return self._runner.launch(plan)

    def release_sequence(self, sequence_id: int) -> None:
        """Passed through."""
        self._runner.release_sequence(sequence_id)

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Passed through."""
        self._runner.poison_pages(pages)
