"""Fault points for tests of failure handling, switched on by the environment variable `LORAMUX_FAULT`.

The value is a comma-separated list of `name:argument`:

- `oom_prefill:<n>`: the nth launch that holds a prefill chunk runs out of memory (counted from 1);
- `oom_above:<tokens>`: every launch of more tokens runs out of memory;
- `oom_prompt:<id>`: every launch with tokens of a prompt that holds this token id runs out of memory;
- `oom_output:<id>`: the same of the output that follows such a prompt, from its second token on;
- `device_assert:<n>`: the results of the nth launch are an error after which a CUDA context is of no use;
- `die_after_steps:<n>`: the launch after n good ones raises;
- `slow_step:<ms>`: every launch takes so much longer;
- `load_fail:<text>`: loading an adapter whose path contains the text fails.

A step that runs out of memory has run by then, and only its results are lost: all its writes are done, the most that a
retry has to cope with.

Off by default; when on, the engine says so at every start, at WARNING.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from loramux_server.engine.plan import (
    HostUse,
    OutOfMemory,
    RowPlan,
    Runner,
    SlabView,
    StepHandle,
    StepPlan,
    StepResult,
)

VARIABLE = "LORAMUX_FAULT"

_COUNTS = ("oom_prefill", "oom_above", "oom_prompt", "oom_output", "device_assert", "die_after_steps")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong on purpose."""

    oom_prefill: int | None = None
    oom_above: int | None = None
    oom_prompt: int | None = None
    oom_output: int | None = None
    device_assert: int | None = None
    die_after_steps: int | None = None
    slow_step: float = 0.0
    load_fail: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Faults":
        """Read the variable's value.

        Raises:
            ValueError: Unknown name or bad argument.
        """
        fields: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, argument = item.partition(":")
            try:
                if name in _COUNTS:
                    fields[name] = int(argument)
                elif name == "slow_step":
                    fields[name] = float(argument) / 1000
                elif name == "load_fail" and argument:
                    fields[name] = argument
                else:
                    raise ValueError("no such name, or no argument")
            except ValueError as error:
                raise ValueError(f"{VARIABLE}: {item!r} is not a fault point: {error}") from error
        return cls(**fields)


class _Refused:
    """A step behind one that did not happen."""

    def result(self) -> StepResult:
        raise OutOfMemory("fault point: the step before ran out of memory")


class _LostResults:
    """A step that has run, and an error in the place of its results."""

    def __init__(self, handle: StepHandle, error: Exception) -> None:
        self._handle = handle
        self._error = error

    def result(self) -> StepResult:
        with contextlib.suppress(OutOfMemory):
            self._handle.result()
        raise self._error


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

    def prefetch(self, version_path: str) -> None:
        self._slab.prefetch(version_path)

    def forget(self, version_path: str) -> None:
        self._slab.forget(version_path)

    def in_host(self, version_path: str) -> bool:
        return self._slab.in_host(version_path)

    def poll_host(self) -> list[str]:
        return self._slab.poll_host()

    def host_use(self) -> HostUse:
        return self._slab.host_use()


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
        if plan.behind and plan.behind == self._failed_step:
            return _Refused()
        point = self._out_of_memory(plan)
        handle = self._runner.launch(plan)
        if point is not None:
            self._failed_step = plan.step
            return _LostResults(handle, OutOfMemory(f"fault point {point}"))
        if self._launches == self._faults.device_assert:
            return _LostResults(handle, RuntimeError("CUDA error: device-side assert triggered"))
        return handle

    def _out_of_memory(self, plan: StepPlan) -> str | None:
        """The fault point by which a plan runs out of memory, None if by none."""
        faults = self._faults
        if any(len(row.token_ids) > 1 for row in plan.rows):
            self._prefills += 1
            if self._prefills == faults.oom_prefill:
                return "oom_prefill"
        if faults.oom_above is not None and plan.num_tokens > faults.oom_above:
            return "oom_above"
        if any(row.start < row.prompt_length and _asks(row, faults.oom_prompt) for row in plan.rows):
            return "oom_prompt"
        if any(row.start >= row.prompt_length and _asks(row, faults.oom_output) for row in plan.rows):
            return "oom_output"
        return None

    def release_sequence(self, sequence_id: int) -> None:
        """Passed through."""
        self._runner.release_sequence(sequence_id)

    def poison_pages(self, pages: Sequence[int]) -> None:
        """Passed through."""
        self._runner.poison_pages(pages)


def _asks(row: RowPlan, token_id: int | None) -> bool:
    """Whether the prompt of a row holds a token."""
    return token_id is not None and token_id in row.history[: row.prompt_length]
