"""The operator's directory of adapters, `<root>/<tenant>/<adapter>/`, as it is read; nothing here writes.

Everything blocks. Below the root no link is followed: every name is opened from the directory that holds it. An entry
remembers which files a scan has seen, and a read of other files than those is refused, so that what is taken is one
state of the directory and not a mix of two.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME, TENSORS_NAME
from loramux_server.tenancy.names import NAME, echo
from loramux_server.tenancy.records import FileRecord

PARTIAL = ".partial"
_WANTED = (CONFIG_NAME, TENSORS_NAME, MANIFEST_NAME)
_MOST_ENTRIES = 10_000
_MOST_FILES = 1024
_CHUNK_BYTES = 4 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A pipe must not hold the reader up; what is no regular file is refused after it is open.
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class EntryChanged(Exception):
    """The files are not those that the scan has seen, or the server is stopping; the next scan looks again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """Tells one state of a file or directory from another; times in nanoseconds."""

    name: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """An adapter's directory as a scan found it; equal as long as nothing in it changes.

    Attributes:
        tenant: Checked name.
        adapter: Checked name.
        itself: The directory.
        files: Those that make an adapter, as far as they are there.
    """

    tenant: str
    adapter: str
    itself: FileIdentity
    files: tuple[FileIdentity, ...]

    @property
    def path(self) -> str:
        """Relative to the root."""
        return f"{self.tenant}/{self.adapter}"

    @property
    def newest(self) -> float:
        """Unix seconds of the latest change of the directory or of one of its files."""
        return max(max(item.modified, item.changed) for item in (self.itself, *self.files)) / 1e9

    def size(self, name: str) -> int | None:
        """Bytes of a file; None = it is not there."""
        return next((item.size for item in self.files if item.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAlone:
    """A name in the directory that makes no adapter.

    Attributes:
        tenant: First part of the path, as it stands there.
        adapter: Second part; None = the reason holds for the whole tenant.
        reason: For the log.
    """

    tenant: str
    adapter: str | None
    reason: str

    @property
    def path(self) -> str:
        """Relative to the root."""
        return self.tenant if self.adapter is None else f"{self.tenant}/{self.adapter}"


@dataclass(slots=True, kw_only=True)
class Scan:
    """What one look at the directory found, sorted by name."""

    entries: list[AdapterEntry] = field(default_factory=list)
    left: list[LeftAlone] = field(default_factory=list)


class AdapterDirectory:
    """See the module.

    Args:
        root: The operator's directory; may itself be reached through a link.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def scan(self) -> Scan:
        """Look at every tenant and adapter.

        Raises:
            OSError: The root cannot be read; what cannot be read below it is in `Scan.left`.
        """
        scan = Scan()
        with _opened(self.root, _DIRECTORY) as root:
            names, more = _names(root, _MOST_ENTRIES)
            if more:
                scan.left.append(LeftAlone(tenant="", adapter=None, reason=_too_many(_MOST_ENTRIES)))
            for name in names:
                reason = _unfit(name, root)
                if reason is None:
                    try:
                        self._scan_tenant(name, root, scan)
                        continue
                    except OSError as error:
                        reason = _unreadable(error)
                scan.left.append(LeftAlone(tenant=name, adapter=None, reason=reason))
        return scan

    def read(self, entry: AdapterEntry, name: str, offset: int, count: int) -> bytes:
        """Read a piece of a file; shorter at its end.

        Raises:
            EntryChanged: See there.
            OSError: It cannot be read.
        """
        with self._file(entry, name) as file:
            return _read(file, offset, count)

    def record(self, entry: AdapterEntry, name: str, stopping: threading.Event) -> FileRecord:
        """Hash a file, until `stopping` is set.

        Raises:
            EntryChanged: See there.
            OSError: It cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        with self._file(entry, name) as file:
            while data := _read(file, size, _CHUNK_BYTES):
                if stopping.is_set():
                    raise EntryChanged
                digest.update(data)
                size += len(data)
        return FileRecord(name=name, size=size, sha256=digest.hexdigest())

    def _scan_tenant(self, tenant: str, root: int, scan: Scan) -> None:
        with _opened(tenant, _DIRECTORY | os.O_NOFOLLOW, root) as parent:
            names, more = _names(parent, _MOST_ENTRIES)
            if more:
                scan.left.append(LeftAlone(tenant=tenant, adapter=None, reason=_too_many(_MOST_ENTRIES)))
            for name in names:
                reason = _unfit(name, parent)
                if reason is None:
                    try:
                        entry, reason = _look(tenant, name, parent)
                    except FileNotFoundError:  # renamed away meanwhile
                        continue
                    except OSError as error:
                        entry, reason = None, _unreadable(error)
                    if entry is not None:
                        scan.entries.append(entry)
                        continue
                scan.left.append(LeftAlone(tenant=tenant, adapter=name, reason=reason or ""))

    @contextmanager
    def _file(self, entry: AdapterEntry, name: str) -> Iterator[int]:
        with (
            _opened(self.root, _DIRECTORY) as root,
            _missing_is_changed(),
            _opened(entry.tenant, _DIRECTORY | os.O_NOFOLLOW, root) as tenant,
            _opened(entry.adapter, _DIRECTORY | os.O_NOFOLLOW, tenant) as adapter,
            _opened(name, _FILE, adapter) as file,
        ):
            if _identity(name, os.fstat(file)) not in entry.files:
                raise EntryChanged
            yield file


def _look(tenant: str, adapter: str, parent: int) -> tuple[AdapterEntry | None, str]:
    """The entry, or None and the reason why there is none."""
    with _opened(adapter, _DIRECTORY | os.O_NOFOLLOW, parent) as directory:
        names, more = _names(directory, _MOST_FILES)
        if more:
            return None, _too_many(_MOST_FILES)
        files = []
        for name in names:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                return None, f"it holds {echo(name)}, a symbolic link; put the file itself there"
            if name in _WANTED:
                if not stat.S_ISREG(status.st_mode):
                    return None, f"{name} is no regular file"
                files.append(_identity(name, status))
        itself = _identity(adapter, os.fstat(directory))
    return AdapterEntry(tenant=tenant, adapter=adapter, itself=itself, files=tuple(files)), ""


def _unfit(name: str, parent: int) -> str | None:
    """Why a name is not gone into; None = it is a directory with a name that can be served."""
    if name.startswith("."):
        return "its name starts with a dot"
    if name.endswith(PARTIAL):
        return f"its name ends in {PARTIAL}; rename it when it is complete"
    if not NAME.fullmatch(name):
        return "it is no valid name; use 1 to 63 of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"
    try:
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except OSError as error:
        return _unreadable(error)
    if stat.S_ISLNK(mode):
        return "it is a symbolic link; put the directory itself there"
    return None if stat.S_ISDIR(mode) else "it is no directory"


def _names(directory: int, most: int) -> tuple[list[str], bool]:
    """Sorted names, and whether there are more than that."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in islice(entries, most + 1)]
    return sorted(names[:most]), len(names) > most


def _identity(name: str, status: os.stat_result) -> FileIdentity:
    return FileIdentity(
        name=name,
        device=status.st_dev,
        inode=status.st_ino,
        size=status.st_size,
        modified=status.st_mtime_ns,
        changed=status.st_ctime_ns,
    )


def _read(file: int, offset: int, count: int) -> bytes:
    parts = []
    while count > 0 and (data := os.pread(file, count, offset)):
        parts.append(data)
        offset += len(data)
        count -= len(data)
    return b"".join(parts)


def _too_many(most: int) -> str:
    return f"it holds more than {most} entries; the rest is not looked at"


def _unreadable(error: OSError) -> str:
    return f"it cannot be read ({error.strerror or type(error).__name__})"


@contextmanager
def _missing_is_changed() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise EntryChanged from error


@contextmanager
def _opened(name: str | Path, flags: int, parent: int | None = None) -> Iterator[int]:
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
