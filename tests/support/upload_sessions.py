"""Upload sessions over a real store, without a registry."""

from pathlib import Path
from typing import Any

import pytest

from loramux_server.errors import LoramuxServerError, Reason
from loramux_server.lora.upload_request import UploadLimits
from loramux_server.lora.upload_session import UploadSession, ValidatedAdapter
from loramux_server.lora.uploads import UploadSessions
from loramux_server.tenancy.records import FileRecord, VersionRecord, VersionState
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import FakeValidator, upload_request

DATA = bytes(range(256)) * 5
T = "default"


class Uploads:
    """Sessions over a real store; `commit` records what it was given."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        self.root = root
        self.validator = FakeValidator()
        self.now = 1000.0
        self.known: Path | None = None
        self.commits: list[tuple[FileRecord, ...]] = []
        self.limits = UploadLimits(chunk_bytes=1024, uploads=2, tenant_bytes=3000, lifetime=3600.0)
        self.sessions = UploadSessions(
            self.store,
            self.validator,
            limits=self.limits,
            find_tensors=lambda tenant, file: self.known,
            clock=lambda: self.now,
        )

    async def commit(self, session: UploadSession, validated: ValidatedAdapter) -> VersionRecord:
        """Move the bytes to their place and record them."""
        self.commits.append(session.file_records())
        self.store.place(session.tenant, validated.digest, session.directory, in_use=False)
        return VersionRecord(
            tenant=session.tenant,
            adapter=session.request.adapter,
            digest=validated.digest,
            state=VersionState.READY,
            files=session.file_records(),
            max_rank=validated.rank,
            modules=validated.modules,
            slab_units=validated.rank_units,
            tensor_bytes=validated.tensor_bytes,
            base_fingerprint=validated.base_fingerprint,
            base_verified=validated.base_verified,
            create_time=0.0,
            revision=1,
        )

    async def upload(self, data: bytes = DATA, **options: Any) -> str:
        """Start an upload, send what is missing, return its id."""
        started = await self.sessions.start(T, upload_request(data, **options))
        await self.send(started.upload_id, data, started.committed_bytes)
        return started.upload_id

    async def send(self, upload_id: str, data: bytes, offset: int = 0) -> None:
        """Send bytes from an offset on, in chunks."""
        for start in range(offset, len(data), 1024):
            await self.sessions.write(T, upload_id, start, data[start : start + 1024])

    async def finish(self, upload_id: str, tenant: str = T) -> VersionRecord:
        """Validate and commit."""
        return await self.sessions.finish(tenant, upload_id, self.commit)

    def left(self) -> list[Path]:
        """Directories of uploads that are still there."""
        return list((self.root / ".uploads").iterdir())


async def refused(awaitable: Any, kind: type[LoramuxServerError], reason: Reason) -> LoramuxServerError:
    """The error of a call that must fail so."""
    with pytest.raises(kind) as caught:
        await awaitable
    assert caught.value.reason is reason
    return caught.value
