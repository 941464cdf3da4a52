"""Who has which slot and rank units of the slab, what has to leave for a newcomer, what is kept for an aged one."""

from collections.abc import Callable

from loramux_server.engine.adapter_version import Residency, Version
from loramux_server.engine.plan import SlabView
from loramux_server.engine.slab_layout import Reservation, Tenure, Window, find_window, find_window_to_drain


class SlabRoom:
    """Places in the slab. Copies and clears nothing: its owner does, and says so here.

    Args:
        slab: Its capacity.
        on_change: Called when a version that found no room might find some now, or the other way round.
    """

    def __init__(self, slab: SlabView, *, on_change: Callable[[], None]) -> None:
        self._slab = slab
        self._on_change = on_change
        self._by_slot: dict[int, Version] = {}
        self._reserved: Reservation | None = None
        self._tick = 0
        # Fewest rank units known not to fit since room last appeared: spares a search for each waiting request.
        self._too_many_units: int | None = None

    @property
    def occupants(self) -> list[Version]:
        """Versions in the slab, loads in flight included."""
        return list(self._by_slot.values())

    def at(self, slot: int) -> Version:
        """The version in a slot."""
        return self._by_slot[slot]

    def find(self, known: Version) -> Window | None:
        """A place for a version of known size and what must leave it first, a slot included; None without one."""
        if self._too_many_units is not None and known.units >= self._too_many_units:
            return None
        tenures = self._tenures()
        window = find_window(tenures, known.units, self._slab.rank_units)
        if window is None:
            self._too_many_units = known.units
            return None
        if window.leaving or len(self._by_slot) < self._slab.max_slots:
            return window
        evictable = [tenure for tenure in tenures if not tenure.busy]
        if not evictable:
            self._too_many_units = 1
            return None
        oldest = min(evictable, key=lambda tenure: tenure.last_used)
        return Window(first_unit=window.first_unit, leaving=(oldest.version,))

    def occupy(self, known: Version, window: Window) -> None:
        """Give a version a place that `find` found, after everything has left it."""
        known.slot = next(slot for slot in range(self._slab.max_slots) if slot not in self._by_slot)
        known.state, known.first_unit = Residency.LOADING, window.first_unit
        self._by_slot[known.slot] = known
        self.touch(known)
        self._on_change()

    def vacate(self, known: Version) -> None:
        """Take a version's place back."""
        assert known.uses == 0, f"{known.spec.version} is in use"
        del self._by_slot[known.slot]
        known.state, known.slot, known.first_unit, known.fresh = Residency.STORE, -1, -1, False
        self.appeared()

    def touch(self, known: Version) -> None:
        """Note that a version was used now."""
        self._tick += 1
        known.last_used = self._tick

    def appeared(self) -> None:
        """Note that something may have become free."""
        self._too_many_units = None
        self._on_change()

    def reserve(self, known: Version | None) -> None:
        """Keep a place free for a version, or for none.

        The window with the least work in it is chosen, and again when something new was loaded; newcomers may not
        start to use what stands there, nor load anything, until the reservation is given up.
        """
        if self._reserved is not None and (known is None or self._reserved.version != known.spec.version):
            self._reserved = None
            self._on_change()
        if known is None or known.state is not Residency.STORE or known.units == 0:
            return
        present = frozenset(entry.spec.version for entry in self._by_slot.values())
        if self._reserved is not None and present <= self._reserved.present:
            return
        tenures = self._tenures()
        window = find_window_to_drain(tenures, known.units, self._slab.rank_units)
        draining = frozenset(window.leaving) if window is not None else frozenset()
        if not draining and len(self._by_slot) >= self._slab.max_slots:
            draining = frozenset([min(tenures, key=lambda t: (t.busy, t.last_used)).version])
        self._reserved = Reservation(version=known.spec.version, draining=draining, present=present)
        self._on_change()

    def blocks(self, version: str) -> bool:
        """Whether a reservation for another version keeps newcomers from loading this one."""
        return self._reserved is not None and self._reserved.version != version

    def drains(self, version: str) -> bool:
        """Whether a version stands where a reservation is, so that newcomers may not start to use it."""
        return self._reserved is not None and version in self._reserved.draining

    def _tenures(self) -> list[Tenure]:
        return [
            Tenure(
                version=known.spec.version,
                first_unit=known.first_unit,
                units=known.units,
                busy=known.uses + (known.state is Residency.LOADING or known.fresh),
                last_used=known.last_used,
            )
            for known in self._by_slot.values()
        ]

    def check_integrity(self) -> None:
        """Assert that rows do not overlap and that no room appeared unnoticed."""
        taken: set[int] = set()
        for slot, known in self._by_slot.items():
            assert known.slot == slot and known.state is not Residency.STORE
            assert 0 <= slot < self._slab.max_slots
            rows = set(range(known.first_unit, known.first_unit + known.units))
            assert known.units > 0 and not rows & taken and max(rows) < self._slab.rank_units
            taken |= rows
        if self._too_many_units is not None:
            free_slot = len(self._by_slot) < self._slab.max_slots or not all(t.busy for t in self._tenures())
            window = find_window(self._tenures(), self._too_many_units, self._slab.rank_units)
            assert window is None or not free_slot, "room appeared unnoticed"
