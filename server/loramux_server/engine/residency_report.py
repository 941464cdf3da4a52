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
        in_host: Whether the rows of the version at a path are in host memory.
    """

    def __init__(self, emit: Callable[[Event], None], *, in_host: Callable[[str], bool]) -> None:
        self._emit = emit
        self._in_host = in_host
        # Versions whose reference count may have moved since they were last told.
        self._moved: dict[str, Version] = {}

    def tell(self, known: Version, *, dropped: bool = False) -> None:
        """Tell the state of a version now."""
        version, residency = known.spec.version, self._level(known)
        known.told = "store" if dropped else residency
        self._moved.pop(version, None)
        self._emit(VersionState(version=version, residency=residency, references=known.references, dropped=dropped))

    def moved(self, known: Version) -> None:
        """Rows of a version came to host memory or left it: tell it if that shows."""
        if known.told != self._level(known):
            self.tell(known)

    def _level(self, known: Version) -> str:
        if known.state is Residency.GPU:
            return "gpu"
        return "host" if self._in_host(known.spec.path) else "store"

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
