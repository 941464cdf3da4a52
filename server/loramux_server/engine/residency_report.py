"""What the front end is told about versions: residency at once, references in bulk."""

from collections.abc import Callable

from loramux_server.engine.adapter_version import Residency, Version
from loramux_server.engine.messages import Event, VersionState


class ResidencyReport:
    """Emits `VersionState`.

    References come and go with every request. The first request on a version is told at once, so that one shorter than
    the reporting interval leaves a trace; whatever follows is told with the next `flush`.

    Args:
        emit: Takes the events.
    """

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        # Versions whose reference count may have moved since they were last told.
        self._moved: dict[str, Version] = {}

    def tell(self, known: Version, *, dropped: bool = False) -> None:
        """Tell the state of a version now."""
        version, residency = known.spec.version, "gpu" if known.state is Residency.GPU else "store"
        self._moved.pop(version, None)
        self._emit(VersionState(version=version, residency=residency, references=known.references, dropped=dropped))

    def bound(self, known: Version) -> None:
        """A reference was taken."""
        if known.spec.version not in self._moved:
            self.tell(known)
        self._moved[known.spec.version] = known

    def unbound(self, known: Version) -> None:
        """A reference was given back."""
        self._moved[known.spec.version] = known

    def flush(self) -> None:
        """Tell every version whose references moved."""
        for known in list(self._moved.values()):
            self.tell(known)

    def check_integrity(self, versions: dict[str, Version]) -> None:
        """Assert that only known versions wait to be told."""
        assert all(versions.get(name) is known for name, known in self._moved.items())
