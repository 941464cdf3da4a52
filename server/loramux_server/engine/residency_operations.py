"""Operations on adapter versions that are answered later: preloads and unloads."""

from collections.abc import Callable, Iterable

from loramux_server.engine.adapter_version import Room, Version
from loramux_server.engine.messages import Completed, ErrorSpec, Event
from loramux_server.engine.wire_error import error_spec
from loramux_server.errors import LoramuxServerError, Reason, ResourceExhausted

PRELOAD_PATIENCE = 10.0
"""Seconds a `Preload` waits for room."""


class ResidencyOperations:
    """Answers each operation once, by `Completed`.

    Args:
        emit: Takes the events.
        want: Asks for a version in the slab, as `AdapterResidency.want` for a newcomer.
    """

    def __init__(self, emit: Callable[[Event], None], *, want: Callable[[Version], Room]) -> None:
        self._emit = emit
        self._want = want
        self._preloading: dict[str, Version] = {}

    @property
    def preloading(self) -> bool:
        """Whether a preload waits."""
        return bool(self._preloading)

    def preload(self, known: Version, operation_id: str, now: float) -> None:
        """Load a version ahead of its requests."""
        known.preloads.append((operation_id, now + PRELOAD_PATIENCE))
        self._preloading[known.spec.version] = known
        self._advance(known, now)

    def advance(self, now: float) -> None:
        """Go on with every preload."""
        for known in list(self._preloading.values()):
            self._advance(known, now)

    def _advance(self, known: Version, now: float) -> None:
        try:
            room = self._want(known)
        except LoramuxServerError as error:
            self.end_preloads(known, error_spec(error))
            return
        if room is Room.READY:
            self.end_preloads(known, None)
            return
        if room is Room.NONE:
            late = [operation_id for operation_id, until in known.preloads if until <= now]
            known.preloads = [entry for entry in known.preloads if entry[1] > now]
            full = ResourceExhausted(
                Reason.ADAPTER_SLOTS_EXHAUSTED, "every rank unit is in use; unpin or unload an adapter", retry_after=1.0
            )
            self.answer(late, error_spec(full))
            if not known.preloads:
                del self._preloading[known.spec.version]

    def end_preloads(self, known: Version, error: ErrorSpec | None) -> None:
        """Answer every preload of a version."""
        preloads, known.preloads = known.preloads, []
        self._preloading.pop(known.spec.version, None)
        self.answer([operation_id for operation_id, _ in preloads], error)

    def end_unloads(self, known: Version, error: ErrorSpec | None) -> bool:
        """Answer every unload of a version; returns whether there was one."""
        unloads, known.unloads = known.unloads, []
        self.answer(unloads, error)
        return bool(unloads)

    def answer(self, operation_ids: Iterable[str], error: ErrorSpec | None) -> None:
        """Answer operations."""
        for operation_id in operation_ids:
            self._emit(Completed(operation_id=operation_id, error=error))

    def check_integrity(self, versions: dict[str, Version]) -> None:
        """Assert that exactly the known versions with a preload are preloading."""
        for name, known in versions.items():
            assert bool(known.preloads) == (self._preloading.get(name) is known), f"{name}: preloads"
        assert set(self._preloading) <= set(versions)
