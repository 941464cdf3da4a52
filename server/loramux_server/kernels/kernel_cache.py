"""Compiled kernels on disk, so that a start does not wait for a compiler: one file each, whole and private, or none.

The folder is `LORAMUX_KERNEL_CACHE`, else `$XDG_CACHE_HOME/loramux/kernels`, else `~/.cache/loramux/kernels`. What lies
there is run on the device, so it is used only if it belongs to this user and nobody else may write to it. A file begins
with the digest of the rest: one that was cut short or has rotted is removed and made anew. Whatever is wrong costs a
compilation and a line in the log, never the start.
"""

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)

_DIGEST_BYTES = 32
_MAX_BYTES = 64 << 20


def default_folder() -> Path | None:
    """Where kernels are kept; None, and a line in the log, if this user has no place for them."""
    if chosen := os.environ.get("LORAMUX_KERNEL_CACHE"):
        return Path(chosen)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        _log.warning("compiled kernels are not kept: %s; set LORAMUX_KERNEL_CACHE", error)
        return None
    return cache / "loramux" / "kernels"


class KernelCache:
    """Binaries by name.

    Args:
        folder: Made, with mode 0700, if it is not there; None = nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder if folder is not None and _usable(folder) else None
        self._writes = True

    def get(self, name: str) -> bytes | None:
        """A binary; None if it is not there or not whole.

        Args:
            name: Hexadecimal digest of all that the binary depends on.
        """
        if self._folder is None:
            return None
        path = self._folder / f"{name}.cubin"
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("%s cannot be read and is compiled again: %s", path, error)
            return None
        binary = content[_DIGEST_BYTES:]
        if not binary or hashlib.sha256(binary).digest() != content[:_DIGEST_BYTES]:
            _log.warning("%s is damaged and is compiled again", path)
            self.remove(name)
            return None
        return binary

    def put(self, name: str, binary: bytes) -> None:
        """Keep a binary; readers see all of it or nothing. A folder that takes no file is said once.

        Args:
            name: As in `get`.
            binary: What to keep.
        """
        if self._folder is None or not self._writes:
            return
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=f"{name}.", delete=False) as scratch:
                try:
                    scratch.write(hashlib.sha256(binary).digest() + binary)
                    scratch.flush()
                    os.replace(scratch.name, self._folder / f"{name}.cubin")
                except BaseException:
                    os.unlink(scratch.name)
                    raise
        except OSError as error:
            self._writes = False
            _log.warning("compiled kernels are not kept, the next start compiles them again: %s", error)

    def remove(self, name: str) -> None:
        """Forget a binary that turned out to be no good; one that cannot be removed is left."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / f"{name}.cubin").unlink()


def _usable(folder: Path) -> bool:
    """Whether a folder is this user's alone to write to; made if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        _log.warning("compiled kernels are not kept: %s; set LORAMUX_KERNEL_CACHE to a folder of yours", error)
        return False
    if not stat.S_ISDIR(found.st_mode):
        _log.warning("compiled kernels are not kept: %s is no folder", folder)
        return False
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        _log.warning(
            "compiled kernels are not kept: %s belongs to user %d with mode %o, so somebody else could put code there; "
            "make it yours with mode 700, or set LORAMUX_KERNEL_CACHE",
            folder,
            found.st_uid,
            stat.S_IMODE(found.st_mode),
        )
        return False
    return True
