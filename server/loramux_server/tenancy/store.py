"""The local adapter store: `<root>/objects/<tenant>/<digest>/`, immutable directories named by their content.

```
<root>/.lock            held by flock for the life of a server
<root>/.uploads/<id>/   uploads in progress; nothing survives a start
<root>/.trash/<id>/     on their way out; nothing survives a start
<root>/objects/<tenant>/<digest>/adapter_config.json, adapter_model.safetensors, [loramux_manifest.json]
```

A directory gets its final name by one rename, after its files and before its parent are synced; it leaves by one rename
into the trash. So a crash leaves the whole object or none. Which objects count is the registry's word alone.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_server.errors import Reason, Unavailable
from loramux_server.tenancy.names import DIGEST, NAME

_LOCK = ".lock"
_UPLOADS = ".uploads"
_TRASH = ".trash"
_OBJECTS = "objects"


class StoreError(RuntimeError):
    """The store cannot be used; raised at start, for the operator."""


class StoreInUse(StoreError):
    """Another server holds the directory."""


class StoreNotWritable(StoreError):
    """The directory cannot be made or written."""


class DirectoryLock:
    """Exclusive use of a directory, made if missing, until `close` or the end of the process.

    Args:
        directory: The directory, for the store or for the registry's state.

    Raises:
        StoreNotWritable: It cannot be made or written.
        StoreInUse: Another process, or another lock of this one, holds it.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreNotWritable(
                f"{directory} cannot be written ({error.strerror}); give a directory that this user may write"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if isinstance(error, BlockingIOError):
                raise StoreInUse(
                    f"{directory} is in use by another loramux server; stop that one or give another directory"
                ) from error
            raise StoreNotWritable(f"{directory} cannot be locked ({error.strerror})") from error

    def close(self) -> None:
        """Give the directory up; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class LocalStore:
    """See the module. Every method blocks: call it off the event loop.

    Args:
        root: Directory of the store; made when missing, then held exclusively.

    Raises:
        StoreInUse: Another server holds it.
        StoreNotWritable: It cannot be made or written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._lock = DirectoryLock(self._root)
        try:
            for name in (_UPLOADS, _TRASH, _OBJECTS):
                (self._root / name).mkdir(mode=0o700, exist_ok=True)
            _sync(self._root)
            for name in (_UPLOADS, _TRASH):
                for left in (self._root / name).iterdir():
                    _remove_tree(left)
        except OSError as error:
            self._lock.close()
            raise StoreNotWritable(
                f"{self._root} cannot be written ({error.strerror}); give a directory that this user may write"
            ) from error

    def close(self) -> None:
        """Give the store up."""
        self._lock.close()

    def path(self, tenant: str, digest: str) -> Path:
        """Directory of an object, whether it exists or not."""
        assert NAME.fullmatch(tenant) and DIGEST.fullmatch(digest), "only checked names become paths"
        return self._root / _OBJECTS / tenant / digest

    def contains(self, tenant: str, digest: str) -> bool:
        """Whether an object is there."""
        return self.path(tenant, digest).is_dir()

    def new_upload(self) -> Path:
        """Make an empty directory for an upload.

        Raises:
            Unavailable: STORE_UNAVAILABLE.
        """
        directory = self._root / _UPLOADS / secrets.token_hex(16)
        with store_errors():
            directory.mkdir(mode=0o700)
        return directory

    def place(self, tenant: str, digest: str, directory: Path, *, in_use: bool) -> None:
        """Move a complete directory to its final name, unless the object is there for good.

        Args:
            tenant: Owner.
            digest: Its version digest.
            directory: Made by `new_upload`.
            in_use: A version uses the object already: what is there stays, and so does `directory`. Otherwise what is
                there was never committed and gives way.

        Raises:
            Unavailable: STORE_UNAVAILABLE.
        """
        target = self.path(tenant, digest)
        with store_errors():
            if target.exists():
                if in_use:
                    return
                self.remove(tenant, digest)
            for file in directory.iterdir():
                file.chmod(0o400)
                _sync(file)
            _sync(directory)
            if not target.parent.is_dir():
                target.parent.mkdir(mode=0o700, exist_ok=True)
                _sync(target.parent.parent)
            directory.rename(target)
            _sync(target.parent)

    def take_back(self, tenant: str, digest: str, directory: Path) -> None:
        """Undo `place` of an object that was not committed; nothing happens if it did not get that far.

        Raises:
            Unavailable: STORE_UNAVAILABLE.
        """
        target = self.path(tenant, digest)
        with store_errors():
            if target.exists() and not directory.exists():
                target.rename(directory)
                _sync(target.parent)

    def remove(self, tenant: str, digest: str) -> None:
        """Delete an object; a missing one is no error.

        Raises:
            Unavailable: STORE_UNAVAILABLE.
        """
        target = self.path(tenant, digest)
        with store_errors():
            if not target.exists():
                return
            grave = self._root / _TRASH / secrets.token_hex(16)
            target.rename(grave)
            _sync(target.parent)
            _remove_tree(grave)

    def discard_upload(self, directory: Path) -> None:
        """Delete the directory of an upload; a missing one is no error.

        Raises:
            Unavailable: STORE_UNAVAILABLE.
        """
        assert directory.parent == self._root / _UPLOADS, "not a directory of an upload"
        with store_errors():
            if directory.exists():
                _remove_tree(directory)


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn an `OSError` of the file system into STORE_UNAVAILABLE; its text, which may name a path, stays the cause."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            Reason.STORE_UNAVAILABLE,
            "the adapter store cannot be read or written; nothing was changed, retry later",
            retry_after=5.0,
        ) from error


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
