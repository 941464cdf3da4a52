"""Uploads in progress: bytes arrive by offset, are hashed as they come, and become a version once validated.

A session belongs to a tenant, counts to its bytes and ends after an hour. It lives in this process and in the store's
upload directory; after a restart the client starts again. Files, hashing and validation never block the event loop.
Names of files are ours: what a caller calls its file is compared, never used.
"""

import asyncio
import functools
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME
from loramux_server.errors import (
    FailedPrecondition,
    InvalidRequest,
    LoramuxServerError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.lora.upload_request import UploadLimits, UploadRequest
from loramux_server.lora.upload_session import Upload, UploadSession, ValidatedAdapter
from loramux_server.tenancy.records import FileRecord, VersionRecord
from loramux_server.tenancy.store import LocalStore, store_errors

_log = logging.getLogger(__name__)


class AdapterValidator(Protocol):
    """Checks a complete adapter directory outside of this process."""

    async def validate(self, directory: Path) -> ValidatedAdapter:
        """Check shapes, numbers, base and digest.

        Raises:
            InvalidRequest: The adapter can never be taken.
            FailedPrecondition: Not on this base: ADAPTER_INCOMPATIBLE, ADAPTER_NUMERICS.
            LoramuxServerError: Anything else may pass on a retry.
        """
        ...


Commit = Callable[[UploadSession, ValidatedAdapter], Awaitable[VersionRecord]]
FindTensors = Callable[[str, FileRecord], Path | None]


class UploadSessions:
    """All uploads of this process.

    Args:
        store: Where the bytes go.
        validator: Checks complete uploads.
        limits: Bounds.
        find_tensors: Path of a file that the tenant already has in the store, by its record; blocks.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: LocalStore,
        validator: AdapterValidator,
        *,
        limits: UploadLimits,
        find_tensors: FindTensors,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._validator = validator
        self._limits = limits
        self._find_tensors = find_tensors
        self._clock = clock
        self._sessions: dict[str, UploadSession] = {}

    async def start(self, tenant: str, request: UploadRequest) -> Upload:
        """Open an upload, or resume the one that an identical request opened.

        Args:
            tenant: The acted-for tenant.
            request: Checked by `upload_request.check_upload_request`.

        Raises:
            ResourceExhausted: TENANT_QUOTA.
            Unavailable: STORE_UNAVAILABLE.
        """
        await self.expire()
        await self._make_room(tenant, request)
        found = next((item for item in self._in_progress(tenant) if item.request == request), None)
        session = found or self._begin(tenant, request)
        assert session.opening is not None, "a session opens before anyone sees it"
        # A caller that leaves meanwhile leaves a whole upload behind, which counts and expires like any other.
        await asyncio.shield(session.opening)
        return self._view(session)

    async def write(self, tenant: str, upload_id: str, offset: int, data: bytes) -> Upload:
        """Append bytes at the committed offset.

        Raises:
            NotFound: UPLOAD_NOT_FOUND.
            InvalidRequest: Wrong offset (metadata `committed_bytes` says the right one), no or too many bytes.
            Unavailable: STORE_UNAVAILABLE.
        """
        session = self._find(tenant, upload_id)
        if not 1 <= len(data) <= self._limits.chunk_bytes:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"data has {len(data)} bytes; send 1 to {self._limits.chunk_bytes}",
                field="data",
            )
        if session.task is not None or session.ended:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER, f"upload {upload_id} is complete; finish it", field="upload_id"
            )
        session.active_time = self._clock()
        await asyncio.to_thread(self._append, session, offset, data)
        return self._view(session)

    async def get(self, tenant: str, upload_id: str) -> Upload:
        """Read an upload.

        Raises:
            NotFound: UPLOAD_NOT_FOUND.
        """
        await self.expire()
        return self._view(self._find(tenant, upload_id))

    async def finish(self, tenant: str, upload_id: str, commit: Commit) -> VersionRecord:
        """Validate a complete upload and commit it; calls that come meanwhile or later get the same outcome.

        The work goes on when the caller leaves.

        Args:
            tenant: The acted-for tenant.
            upload_id: The upload.
            commit: Moves the directory into the store and makes the version.

        Raises:
            NotFound: UPLOAD_NOT_FOUND.
            InvalidRequest: Bytes are missing, DIGEST_MISMATCH (the upload is at 0 again), or what validation refused.
            FailedPrecondition: What validation refused.
            LoramuxServerError: What may pass on a retry.
        """
        session = self._find(tenant, upload_id)
        if session.version is not None:
            return session.version
        if session.failure is not None:
            # Kept for every later call: without this its traceback would grow by the frames of each.
            raise session.failure.with_traceback(None)
        if session.task is None:
            self._check_complete(session)
            session.task = asyncio.create_task(self._conclude(session, commit))
            session.task.add_done_callback(_log_bug)
        outcome = await asyncio.shield(session.task)
        if isinstance(outcome, LoramuxServerError):
            raise outcome.with_traceback(None)
        return outcome

    async def expire(self) -> None:
        """Drop the sessions whose hour is over, except those in validation."""
        now = self._clock()
        for session in list(self._sessions.values()):
            if now >= session.expire_time and (session.task is None or session.task.done()):
                self._sessions.pop(session.upload_id, None)
                try:
                    await asyncio.to_thread(self._discard, session)
                except Unavailable:
                    # Whoever calls meanwhile has nothing to do with it.
                    _log.warning("an expired upload stays in the store until the next start", exc_info=True)

    async def close(self) -> None:
        """Stop validations and drop every session."""
        for session in list(self._sessions.values()):
            if session.task is not None:
                session.task.cancel()
                await asyncio.wait([session.task])
            if session.opening is not None:
                await asyncio.wait([session.opening])
            await asyncio.to_thread(self._discard, session)
        self._sessions.clear()

    def check_integrity(self) -> None:
        """Assert that counters, bounds and states agree."""
        for session in self._sessions.values():
            assert 0 <= session.committed <= session.request.tensors.size, "more bytes than announced"
            assert not (session.version and session.failure), "two outcomes"

    # --- internals -------------------------------------------------------------------------------------------------

    def _begin(self, tenant: str, request: UploadRequest) -> UploadSession:
        """Take a place, without an await, so that concurrent starts cannot pass the quota together; then open."""
        self._check_quota(tenant, request)
        session = UploadSession(
            upload_id=secrets.token_hex(16),
            tenant=tenant,
            request=request,
            directory=Path(),
            expire_time=self._clock() + self._limits.lifetime,
            active_time=self._clock(),
        )
        self._sessions[session.upload_id] = session
        session.opening = asyncio.ensure_future(asyncio.to_thread(self._open, session))
        session.opening.add_done_callback(functools.partial(self._opened, session))
        return session

    async def _make_room(self, tenant: str, request: UploadRequest) -> None:
        """Give up abandoned uploads, the longest idle first, if the tenant's new one finds no room otherwise.

        A caller that crashes between start and finish would lock its tenant out for the whole lifetime.
        """
        while True:
            mine = self._in_progress(tenant)
            if any(item.request == request for item in mine) or self._has_room(mine, request):
                return
            since = self._clock() - self._limits.idle
            idle = [item for item in mine if item.task is None and item.active_time <= since]
            if not idle:
                return
            min(idle, key=lambda item: item.active_time).expire_time = self._clock()
            await self.expire()

    def _in_progress(self, tenant: str) -> list[UploadSession]:
        return [item for item in self._sessions.values() if item.tenant == tenant and not item.ended]

    def _has_room(self, mine: Sequence[UploadSession], request: UploadRequest) -> bool:
        held = sum(item.request.total_bytes for item in mine)
        return len(mine) < self._limits.uploads and held + request.total_bytes <= self._limits.tenant_bytes

    def _opened(self, session: UploadSession, opening: "asyncio.Future[None]") -> None:
        if opening.cancelled() or opening.exception() is not None:
            self._sessions.pop(session.upload_id, None)

    def _find(self, tenant: str, upload_id: str) -> UploadSession:
        session = self._sessions.get(upload_id)
        if session is None or session.tenant != tenant:
            raise _not_found()
        return session

    def _view(self, session: UploadSession) -> Upload:
        return Upload(
            upload_id=session.upload_id,
            tenant=session.tenant,
            adapter=session.request.adapter,
            committed_bytes=session.committed,
            total_bytes=session.request.tensors.size,
            expire_time=session.expire_time,
        )

    def _check_quota(self, tenant: str, request: UploadRequest) -> None:
        mine = self._in_progress(tenant)
        if len(mine) >= self._limits.uploads:
            raise ResourceExhausted(
                Reason.TENANT_QUOTA,
                f"the tenant has {len(mine)} uploads in progress, the limit is {self._limits.uploads}; "
                f"finish one, or wait: one without a write for {self._limits.idle:g} s makes room",
                metadata={"quota": "uploads", "limit": str(self._limits.uploads)},
                retry_after=5.0,
            )
        held = sum(item.request.total_bytes for item in mine)
        if held + request.total_bytes > self._limits.tenant_bytes:
            raise ResourceExhausted(
                Reason.TENANT_QUOTA,
                f"uploads in progress hold {held} bytes, this one needs {request.total_bytes} more, the limit is "
                f"{self._limits.tenant_bytes}; finish one first",
                metadata={"quota": "upload_bytes", "limit": str(self._limits.tenant_bytes)},
                retry_after=5.0,
            )
        # Ended sessions are kept for repeated calls; drop the oldest beyond the same bound.
        ended = [item for item in self._sessions.values() if item.tenant == tenant and item.ended]
        for item in ended[: max(0, len(ended) - self._limits.ended)]:
            del self._sessions[item.upload_id]

    def _open(self, session: UploadSession) -> None:
        session.directory = self._store.new_upload()
        try:
            self._fill(session)
        except BaseException:
            self._discard(session)
            raise

    def _fill(self, session: UploadSession) -> None:
        request = session.request
        with store_errors():
            (session.directory / CONFIG_NAME).write_bytes(request.config)
            if request.manifest is not None:
                (session.directory / MANIFEST_NAME).write_bytes(request.manifest)
        known = self._find_tensors(session.tenant, request.tensors)
        target = session.directory / request.tensors.name
        if known is not None:
            try:
                target.hardlink_to(known)
            except OSError as error:
                _log.info("an equal file in the store cannot be linked (%s); the client sends it", error.strerror)
            else:
                session.linked = True
                session.committed = request.tensors.size
                return
        with store_errors():
            target.touch(mode=0o600, exist_ok=False)

    def _append(self, session: UploadSession, offset: int, data: bytes) -> None:
        with session.lock:
            total = session.request.tensors.size
            if session.closed:
                raise _not_found()
            if offset != session.committed:
                raise InvalidRequest(
                    Reason.INVALID_PARAMETER,
                    f"offset is {offset}, the upload has {session.committed} bytes; go on from there",
                    field="offset",
                    metadata={"committed_bytes": str(session.committed)},
                )
            if offset + len(data) > total:
                raise InvalidRequest(
                    Reason.INVALID_PARAMETER,
                    f"data ends at byte {offset + len(data)}, the upload was announced with {total}",
                    field="data",
                    metadata={"committed_bytes": str(session.committed)},
                )
            with store_errors():
                descriptor = os.open(
                    session.directory / session.request.tensors.name, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                )
                try:
                    _write_all(descriptor, data, offset)
                finally:
                    os.close(descriptor)
            session.hasher.update(data)
            session.committed += len(data)

    def _check_complete(self, session: UploadSession) -> None:
        tensors = session.request.tensors
        if session.committed != tensors.size:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"the upload has {session.committed} of {tensors.size} bytes; write the rest, then finish",
                field="upload_id",
                metadata={"committed_bytes": str(session.committed)},
            )
        if not session.linked and session.hasher.hexdigest() != tensors.sha256:
            got = session.hasher.hexdigest()
            session.committed = 0
            session.hasher = hashlib.sha256()
            raise InvalidRequest(
                Reason.DIGEST_MISMATCH,
                f"the bytes of {tensors.name} have sha256 {got}, announced was {tensors.sha256}; write them again "
                "from offset 0",
                field="files[0].sha256",
                metadata={"committed_bytes": "0"},
            )

    async def _conclude(self, session: UploadSession, commit: Commit) -> VersionRecord | LoramuxServerError:
        """Validate and commit; a refusal for good is kept, anything else lets the client finish again."""
        try:
            validated = await self._validator.validate(session.directory)
            session.version = await commit(session, validated)
        except (InvalidRequest, FailedPrecondition) as refusal:
            session.failure = refusal
            await asyncio.to_thread(self._discard, session)
            return refusal
        except LoramuxServerError as error:
            session.task = None
            return error
        except BaseException:
            session.task = None
            raise
        session.closed = True
        return session.version

    def _discard(self, session: UploadSession) -> None:
        with session.lock:
            if not session.closed and session.directory != Path():
                self._store.discard_upload(session.directory)
            session.closed = True


def _not_found() -> NotFound:
    return NotFound(
        Reason.UPLOAD_NOT_FOUND,
        "upload_id is not known to this tenant, or its hour is over; start the upload again",
    )


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]


def _log_bug(task: "asyncio.Task[VersionRecord | LoramuxServerError]") -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("validation of an upload broke", exc_info=task.exception())
