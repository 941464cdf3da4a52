"""Where an adapter's rank units go in the slab: a contiguous window, evicting what was not used for longest."""

import bisect
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tenure:
    """A range of rank units that a version occupies.

    Attributes:
        version: Whose.
        first_unit: First rank unit.
        units: How many.
        busy: Sequences that use it now (a load in flight counts as one); 0 = may be evicted.
        last_used: Larger = more recent.
    """

    version: str
    first_unit: int
    units: int
    busy: int
    last_used: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A place for an adapter and what must leave it first."""

    first_unit: int
    leaving: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Room being made for one version.

    Attributes:
        version: Whom for.
        draining: Versions that newcomers may not start to use, since the room is theirs now.
        present: What was resident when the place was chosen.
    """

    version: str
    draining: frozenset[str]
    present: frozenset[str]


def _windows(tenures: Sequence[Tenure], units: int, capacity: int) -> list[tuple[int, list[Tenure]]]:
    """Windows that begin or end a tenure, each with the tenures inside; these share no unit among themselves."""
    placed = sorted(tenures, key=lambda t: t.first_unit)
    begins = [t.first_unit for t in placed]
    ends = [t.first_unit + t.units for t in placed]
    windows: list[tuple[int, list[Tenure]]] = []
    for first in sorted({0, *begins, *ends}):
        if first + units <= capacity:
            windows.append(
                (first, placed[bisect.bisect_right(ends, first) : bisect.bisect_left(begins, first + units)])
            )
    return windows


def find_window(tenures: Sequence[Tenure], units: int, capacity: int) -> Window | None:
    """The window that can be had now at the least loss, or None.

    The loss is the most recent use among the evicted, then their number: free space first, then the least recently
    used neighbourhood.
    """
    best: tuple[tuple[int, int, int], Window] | None = None
    for first, inside in _windows(tenures, units, capacity):
        if any(t.busy for t in inside):
            continue
        loss = (max((t.last_used for t in inside), default=-1), len(inside), first)
        if best is None or loss < best[0]:
            best = (loss, Window(first_unit=first, leaving=tuple(t.version for t in inside)))
    return None if best is None else best[1]


def find_window_to_drain(tenures: Sequence[Tenure], units: int, capacity: int) -> Window | None:
    """The window with the least work still running in it; None when `units` exceeds `capacity`."""
    best: tuple[tuple[int, int, int], Window] | None = None
    for first, inside in _windows(tenures, units, capacity):
        loss = (sum(t.busy for t in inside), len(inside), first)
        if best is None or loss < best[0]:
            best = (loss, Window(first_unit=first, leaving=tuple(t.version for t in inside)))
    return None if best is None else best[1]
