"""One upload in progress: what it announced, what has arrived, what became of it."""

import asyncio
import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME
from loramux_server.errors import LoramuxServerError
from loramux_server.lora.upload_request import UploadRequest
from loramux_server.tenancy.records import FileRecord, VersionRecord


class ValidatedAdapter(Protocol):
    """What validation found out about an adapter directory."""

    @property
    def digest(self) -> str:
        """Version digest, 64 hexadecimal digits."""
        ...

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        ...

    @property
    def rank_units(self) -> int:
        """Units of 16 rank rows that it takes in the device slab."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the linear modules that it changes, sorted."""
        ...

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        ...

    @property
    def base_fingerprint(self) -> str:
        """Base that it was trained on; "" without a manifest."""
        ...

    @property
    def base_verified(self) -> bool:
        """Whether that is the served base."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An upload as its owner sees it; sizes in bytes, times in Unix seconds."""

    upload_id: str
    tenant: str
    adapter: str
    committed_bytes: int
    total_bytes: int
    expire_time: float


@dataclass(slots=True, kw_only=True, eq=False)
class UploadSession:
    """State of one upload. `lock` guards the file, `committed` and `hasher`; everything else belongs to the event loop.

    Attributes:
        upload_id: Minted here.
        tenant: Owner.
        request: What was announced.
        directory: In the store's upload area.
        expire_time: Unix seconds.
        active_time: Unix seconds of the start or of the last write.
        committed: Bytes written and hashed.
        hasher: sha256 over those.
        linked: The bytes came from a version of the same tenant; their digest was checked then.
        closed: The directory is gone or handed over.
        opening: Makes the directory; nobody sees the upload's id before it has ended.
        task: Validation and commit, once `finish` was called.
        version: The outcome, if it became one.
        failure: The outcome, if it was refused for good.
    """

    upload_id: str
    tenant: str
    request: UploadRequest
    directory: Path
    expire_time: float
    active_time: float
    committed: int = 0
    hasher: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    linked: bool = False
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    opening: "asyncio.Future[None] | None" = None
    task: "asyncio.Task[VersionRecord | LoramuxServerError] | None" = None
    version: VersionRecord | None = None
    failure: LoramuxServerError | None = None

    @property
    def ended(self) -> bool:
        """Whether the outcome is known."""
        return self.version is not None or self.failure is not None

    def file_records(self) -> tuple[FileRecord, ...]:
        """The files of the version, sorted by name."""
        inline = {CONFIG_NAME: self.request.config, MANIFEST_NAME: self.request.manifest}
        records = [
            FileRecord(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in inline.items()
            if data is not None
        ]
        return tuple(sorted([*records, self.request.tensors], key=lambda record: record.name))
