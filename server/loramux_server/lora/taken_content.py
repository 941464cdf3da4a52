"""What was last taken from the operator's directory, kept in the store: one small file, replaced by a rename.

It tells a directory that has changed from one that an operator has merely moved traffic away from. Blocks.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loramux_server.tenancy.names import adapter_name
from loramux_server.tenancy.records import FileRecord
from loramux_server.tenancy.store import store_errors

_log = logging.getLogger(__name__)


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """What was last taken for one adapter.

    Attributes:
        content: `content_of` its files.
        digest: The version that they became; "" = they were not through when this was written.
    """

    content: str
    digest: str


class TakenContent:
    """What was taken, by adapter.

    Args:
        path: The file; missing at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._taken = _load(path)

    def get(self, tenant: str, adapter: str) -> Taken | None:
        """What was last taken for an adapter; None = nothing that is known of."""
        return self._taken.get(adapter_name(tenant, adapter))

    def set(self, tenant: str, adapter: str, taken: Taken) -> None:
        """Keep what was taken.

        Raises:
            Unavailable: STORE_UNAVAILABLE; it stays as it was.
        """
        name = adapter_name(tenant, adapter)
        if self._taken.get(name) == taken:
            return
        after = {**self._taken, name: taken}
        with store_errors():
            _replace(self._path, msgspec.json.encode(after))
        self._taken = after


def content_of(files: Sequence[FileRecord]) -> str:
    """Digest of the files as they are, whatever version they make: 64 hexadecimal digits."""
    lines = sorted(f"{file.name} {file.size} {file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _load(path: Path) -> dict[str, Taken]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Taken])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        _log.warning(
            "%s cannot be read (%s), so what was taken from --adapters is not known: adapters that exist keep their "
            "traffic until their directory changes",
            path.name,
            error,
        )
        return {}


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    parent = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
