"""The local half of an upload: which files of a PEFT directory are sent, and in which pieces."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loramux._adapter_requests import idempotency_key, named
from loramux._errors import DeadlineExceeded, LoramuxError, ServerError
from loramux._requests import check_size, invalid
from loramux.v1 import adapter_pb2 as pb

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "loramux_manifest.json"
CHUNK_BYTES = 1024 * 1024
MAX_CONFIG_BYTES = 64 * 1024
MAX_MANIFEST_BYTES = 1024 * 1024
MAX_LOSSES = 5

Progress = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes in all, from the thread or task that sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAdapter:
    """A PEFT directory that is ready to be sent; nothing else in it is looked at.

    Attributes:
        config: Bytes of adapter_config.json.
        manifest: Bytes of loramux_manifest.json; None if there is none.
        tensors: Path of adapter_model.safetensors.
        size: Bytes of the tensor file.
        sha256: Its digest, 64 hexadecimal digits.
    """

    config: bytes
    manifest: bytes | None
    tensors: Path
    size: int
    sha256: str

    def start_request(self, name: str, labels: Mapping[str, str] | None) -> pb.StartAdapterUploadRequest:
        """Build the request that opens the upload."""
        request = pb.StartAdapterUploadRequest(
            adapter=named(name),
            adapter_config=self.config,
            manifest=self.manifest,
            files=[pb.AdapterFile(name=TENSOR_FILE, size=self.size, sha256=self.sha256)],
            labels=dict(labels or {}),
            idempotency_key=idempotency_key(),
        )
        check_size(request)
        return request

    def pieces(self, upload_id: str, offset: int, progress: Progress | None) -> Pieces:
        """Read the tensor file from `offset` in messages of at most 1 MiB; one is in memory at a time."""
        return Pieces(self._read(upload_id, offset, progress))

    def _read(self, upload_id: str, offset: int, progress: Progress | None) -> Iterator[pb.WriteAdapterUploadRequest]:
        """Read the pieces."""
        with self.tensors.open("rb") as file:
            file.seek(offset)
            while data := file.read(CHUNK_BYTES):
                yield pb.WriteAdapterUploadRequest(upload_id=upload_id, offset=offset, data=data)
                offset += len(data)
                if progress is not None:
                    progress(offset, self.size)


class Pieces:
    """The messages of a write; `failure` is what reading them raised.

    gRPC runs through them in a thread of its own and shows an exception of theirs as a broken call.

    Args:
        messages: The messages.
    """

    def __init__(self, messages: Iterator[pb.WriteAdapterUploadRequest]) -> None:
        self._messages = messages
        self.failure: Exception | None = None

    def __iter__(self) -> Self:
        """Return itself."""
        return self

    def __next__(self) -> pb.WriteAdapterUploadRequest:
        """Read the next message."""
        try:
            return next(self._messages)
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise

    def check(self) -> None:
        """Raise what reading raised: a broken file, or an error of the caller's `progress`."""
        if self.failure is not None:
            raise self.failure


def _read(path: Path, limit: int) -> bytes:
    """Read a small file."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise invalid("path", f"has a {path.name} of more than {limit} bytes")
    return data


def local_adapter(path: str | os.PathLike[str]) -> LocalAdapter:
    """Read and hash a PEFT directory.

    Raises:
        InvalidRequest: It is none, or its weights are not safetensors.
        OSError: A file cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise invalid("path", f"is {str(path)!r}, which is no directory; give the directory that PEFT saved")
    if not (directory / CONFIG_FILE).is_file():
        raise invalid("path", f"has no {CONFIG_FILE}; give the directory that PEFT saved")
    tensors = directory / TENSOR_FILE
    if not tensors.is_file():
        if (directory / "adapter_model.bin").exists():
            raise invalid(
                "path",
                f"has adapter_model.bin, a pickle, which is never sent; save it as {TENSOR_FILE}: "
                "model.save_pretrained(path, safe_serialization=True)",
            )
        raise invalid("path", f"has no {TENSOR_FILE}; give the directory that PEFT saved")
    manifest = directory / MANIFEST_FILE
    digest = hashlib.sha256()
    size = 0
    with tensors.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
            size += len(data)
    if size == 0:
        raise invalid("path", f"has an empty {TENSOR_FILE}")
    return LocalAdapter(
        config=_read(directory / CONFIG_FILE, MAX_CONFIG_BYTES),
        manifest=_read(manifest, MAX_MANIFEST_BYTES) if manifest.is_file() else None,
        tensors=tensors,
        size=size,
        sha256=digest.hexdigest(),
    )


class UploadPosition:
    """Where an upload is, and whether it still gets anywhere.

    Args:
        upload: The upload as the server told it.
    """

    def __init__(self, upload: pb.AdapterUpload) -> None:
        self.upload_id = upload.upload_id
        self.committed = upload.committed_bytes
        self._best = upload.committed_bytes
        self._total = upload.total_bytes
        self._losses = 0

    @property
    def complete(self) -> bool:
        """Whether all bytes are committed."""
        return self.committed >= self._total

    def move(self, upload: pb.AdapterUpload) -> bool:
        """Take the server's word; True if the upload is further than ever (another replica may start at 0)."""
        self.committed = upload.committed_bytes
        further = self.committed > self._best
        self._best = max(self._best, self.committed)
        return further

    def lost(self, error: LoramuxError) -> bool:
        """Whether the server refused a piece for its place only.

        It may do so when a broken stream still had bytes under way. True a few times an upload; then it is an error
        like any other.
        """
        if all(violation.field != "offset" for violation in error.field_violations):
            return False
        self._losses += 1
        return self._losses <= MAX_LOSSES

    def stalled(self) -> ServerError:
        """Return the error for a write that went well and moved nothing."""
        return ServerError(f"the server took the bytes of the upload but stays at {self.committed} of {self._total}")


def remaining(deadline: float, now: float) -> float:
    """Return the seconds to `deadline`, which may be infinite.

    Raises:
        DeadlineExceeded: It has passed.
    """
    if now >= deadline:
        raise DeadlineExceeded("the upload's time is up; another upload of the same files goes on where it stopped")
    return deadline - now
