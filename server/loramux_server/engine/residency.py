"""Adapter versions: which are known, who refers to them, and which are in the slab.

Two counts are kept apart. A *reference* is held by every request that a version is bound to, preempted ones included:
a dropped version is forgotten when it reaches zero. A *use* is held by requests that run: a version in use is never
evicted. Reading and loading are asynchronous; only the requests of the version that loads wait for it. What is wanted
and finds no room yet is read into host memory meanwhile.
"""

import logging
from collections.abc import Callable

from loramux_server.engine.adapter_version import Residency, Room, Version
from loramux_server.engine.messages import ErrorSpec, Event, VersionSpec
from loramux_server.engine.plan import HostUse, SlabView
from loramux_server.engine.residency_operations import ResidencyOperations
from loramux_server.engine.residency_report import ResidencyReport
from loramux_server.engine.slab_room import SlabRoom
from loramux_server.engine.wire_error import error_spec
from loramux_server.errors import NotFound, Reason, ResourceExhausted, Unavailable

logger = logging.getLogger(__name__)


class AdapterResidency:
    """The book of all versions: loads them where `SlabRoom` finds a place, and tells where they are.

    Args:
        slab: The runner's slab.
        emit: Takes `VersionState` and `Completed` events.
        on_forget: Called with the name of a dropped version once nothing refers to it (its KV leaves the prefix cache).
    """

    def __init__(self, slab: SlabView, *, emit: Callable[[Event], None], on_forget: Callable[[str], None]) -> None:
        self._slab = slab
        self._emit = emit
        self._on_forget = on_forget
        self._versions: dict[str, Version] = {}
        # Adapters with the same content share a directory, and so their rows on the host.
        self._at_path: dict[str, set[str]] = {}
        self._operations = ResidencyOperations(emit, want=lambda known: self.want(known.spec.version, newcomer=True))
        self._report = ResidencyReport(emit, in_host=slab.in_host)
        self._room = SlabRoom(slab, on_change=self._changed)
        self.loads = 0
        self.evictions = 0
        self.changes = 0
        """Counts what may change the answer of `want`, so that it need not be asked again in vain."""

    # --- what is known ---------------------------------------------------------------------------------------------

    def put(self, spec: VersionSpec) -> None:
        """Make a version known; a dropped one that is still held comes back."""
        self.changes += 1
        known = self._versions.get(spec.version)
        if known is None:
            self._versions[spec.version] = Version(spec=spec)
            self._at_path.setdefault(spec.path, set()).add(spec.version)
            return
        known.dropped = False
        if known.state is Residency.STORE:
            if known.spec != spec:
                self._leave_path(known)
            known.spec, known.units = spec, 0
            self._at_path.setdefault(spec.path, set()).add(spec.version)

    def drop(self, version: str) -> None:
        """Take no new requests for a version; it is forgotten when the last reference goes."""
        known = self._versions.get(version)
        if known is None:
            return
        known.dropped = True
        self.changes += 1
        self._operations.end_preloads(known, error_spec(_not_found(version)))
        self._settle(known)

    def serves(self, version: str) -> bool:
        """Whether new requests may bind the version."""
        known = self._versions.get(version)
        return known is not None and not known.dropped

    def bind(self, version: str) -> str:
        """Take a reference.

        Returns:
            The version's digest.

        Raises:
            NotFound: Unknown or dropped.
        """
        known = self._versions.get(version)
        if known is None or known.dropped:
            raise _not_found(version)
        known.references += 1
        self._report.bound(known)
        return known.spec.digest

    def unbind(self, version: str) -> None:
        """Give a reference back."""
        known = self._versions[version]
        assert known.references > 0, f"{version} has no reference to give back"
        known.references -= 1
        self._report.unbound(known)
        self._settle(known)

    def report_references(self) -> None:
        """Emit the `VersionState` of every version whose references moved since it was last told."""
        self._report.flush()

    def digest(self, version: str) -> str:
        """Digest of a known version."""
        return self._versions[version].spec.digest

    def expect(self, version: str) -> None:
        """Hint that a request will want a known version: it is read into host memory before its turn."""
        known = self._versions[version]
        if known.state is Residency.STORE and not known.unloads:
            self._slab.prefetch(known.spec.path)

    # --- room in the slab ------------------------------------------------------------------------------------------

    def want(self, version: str, *, newcomer: bool = False) -> Room:
        """Ask for a version in the slab; starts its load when there is room.

        Args:
            version: A known version.
            newcomer: The request is newer than the one that a reservation is for, so it must keep out of its way.

        Raises:
            LoramuxServerError: The adapter cannot be read or can never fit.
        """
        known = self._versions[version]
        if known.unloads:
            return Room.NONE
        blocked = newcomer and self._room.blocks(version)
        if known.state is Residency.GPU:
            return Room.NONE if blocked and self._room.drains(version) else Room.READY
        if known.state is Residency.LOADING:
            return Room.LOADING
        room = Room.NONE if blocked else self._start_load(known)
        if room is Room.NONE:
            self.expect(version)
        return room

    def acquire(self, version: str) -> int:
        """Use a resident version; returns its slot."""
        known = self._versions[version]
        assert known.state is Residency.GPU, f"{version} is not resident"
        known.uses += 1
        self._room.touch(known)
        return known.slot

    def release(self, version: str) -> None:
        """Stop using a version; a launched step may still read its rows (`SlabView` keeps the order)."""
        known = self._versions[version]
        assert known.uses > 0, f"{version} is not in use"
        known.uses -= 1
        self._room.appeared()
        self._room.touch(known)
        self._settle(known)

    def end_of_pass(self) -> None:
        """Every request that waited for a load that has ended had its turn: what nobody took may be evicted.

        Without this, a request tried earlier in the pass could evict a version just before the request that loaded it.
        """
        for known in self._room.occupants:
            if known.fresh:
                known.fresh = False
                self._room.appeared()

    def reserve(self, version: str | None) -> None:
        """Keep a place free for the oldest request that was passed over too often, or for none."""
        self._room.reserve(None if version is None else self._versions[version])

    def _start_load(self, known: Version) -> Room:
        capacity = self._slab.rank_units
        if known.units == 0:
            self.changes += 1
            units = self._slab.units_of(known.spec.path)
            if units is None:
                return Room.LOADING
            known.units = units
        if known.units > capacity:
            raise ResourceExhausted(
                Reason.ADAPTER_SLOTS_EXHAUSTED,
                f"adapter needs {known.units} rank units, the slab has {capacity}; raise rank_units",
            )
        window = self._room.find(known)
        if window is None:
            return Room.NONE
        for version in window.leaving:
            self.evictions += 1
            self._vacate(self._versions[version])
        self._room.occupy(known, window)
        self._slab.start_load(known.slot, known.first_unit, known.units, known.spec.path)
        return Room.LOADING

    def poll(self, now: float) -> list[tuple[str, ErrorSpec]]:
        """Take in loads that ended, go on with preloads; returns versions whose load failed, with the error."""
        failed: list[tuple[str, ErrorSpec]] = []
        for slot, error in self._slab.poll_loads():
            known = self._room.at(slot)
            assert known.state is Residency.LOADING, f"slot {slot} was not loading"
            self.changes += 1
            if error is None:
                known.state = Residency.GPU
                known.fresh = True
                self.loads += 1
                self._report.tell(known)
            else:
                logger.warning("adapter version %s could not be loaded", known.spec.version, exc_info=error)
                spec = error_spec(error)
                failed.append((known.spec.version, spec))
                self._vacate(known, announce=False)
                self._operations.end_preloads(known, spec)
            self._settle(known)
        self._report_host()
        self._operations.advance(now)
        return failed

    def _report_host(self) -> None:
        for path in self._slab.poll_host():
            for version in self._at_path.get(path, ()):
                self._report.moved(self._versions[version])

    # --- operations ------------------------------------------------------------------------------------------------

    def preload(self, operation_id: str, version: str, now: float) -> None:
        """Load a version ahead of its requests; answered by `Completed`."""
        known = self._versions.get(version)
        if known is None or known.dropped:
            self._operations.answer([operation_id], error_spec(_not_found(version)))
            return
        self._operations.preload(known, operation_id, now)

    def unload(self, operation_id: str, version: str) -> None:
        """Free a version's rows once nothing uses it; answered by `Completed`."""
        known = self._versions.get(version)
        if known is None:
            self._operations.answer([operation_id], error_spec(_not_found(version)))
            return
        known.unloads.append(operation_id)
        self.changes += 1
        self._settle(known)

    def cancel_operations(self) -> None:
        """Answer every pending operation: the engine shuts down."""
        spec = error_spec(Unavailable(Reason.DRAINING, "the engine is shutting down"))
        for known in self._versions.values():
            self._operations.end_preloads(known, spec)
            self.changes += self._operations.end_unloads(known, spec)

    @property
    def pending(self) -> bool:
        """Whether loads or preloads are under way."""
        return self._operations.preloading or any(k.state is Residency.LOADING for k in self._room.occupants)

    @property
    def resident(self) -> int:
        """Versions in the slab."""
        return sum(known.state is Residency.GPU for known in self._room.occupants)

    @property
    def rank_units_used(self) -> int:
        """Rank units that are taken, loads in flight included."""
        return sum(known.units for known in self._room.occupants)

    @property
    def host(self) -> HostUse:
        """Gauges and counters of host memory."""
        return self._slab.host_use()

    def _settle(self, known: Version) -> None:
        """Finish what waits for a version to come to rest: unloads and the end of a dropped one."""
        if known.uses or known.state is Residency.LOADING:
            return
        gone = known.dropped and known.references == 0
        if (known.unloads or gone) and known.state is Residency.GPU:
            self._vacate(known, announce=not gone)
        self.changes += self._operations.end_unloads(known, None)
        if gone and self._versions.get(known.spec.version) is known:
            del self._versions[known.spec.version]
            self._leave_path(known)
            self._on_forget(known.spec.version)
            self._report.tell(known, dropped=True)

    def _leave_path(self, known: Version) -> None:
        others = self._at_path[known.spec.path]
        others.remove(known.spec.version)
        if not others:
            del self._at_path[known.spec.path]
            self._slab.forget(known.spec.path)

    def _vacate(self, known: Version, *, announce: bool = True) -> None:
        slot = known.slot
        self._room.vacate(known)
        self._slab.clear(slot)
        if announce:
            self._report.tell(known)

    def _changed(self) -> None:
        self.changes += 1

    def check_integrity(self, *, references: dict[str, int], uses: dict[str, int]) -> None:
        """Assert that rows do not overlap and that counts are exactly those of the living requests."""
        self._room.check_integrity()
        for name, known in self._versions.items():
            assert (known.state is Residency.STORE) == (known.slot == -1)
            assert known.references == references.get(name, 0), f"{name}: {known.references} references"
            assert known.uses == uses.get(name, 0), f"{name}: {known.uses} uses"
            assert known.uses == 0 or known.state is Residency.GPU
            assert not (known.dropped and known.references == 0 and known.state is not Residency.LOADING)
            assert name in self._at_path[known.spec.path]
        assert sum(len(names) for names in self._at_path.values()) == len(self._versions)
        self._operations.check_integrity(self._versions)
        self._report.check_integrity(self._versions)
        assert set(references) <= set(self._versions) and set(uses) <= set(self._versions)


def _not_found(version: str) -> NotFound:
    return NotFound(Reason.ADAPTER_NOT_FOUND, f"adapter version {version} is not served here")
