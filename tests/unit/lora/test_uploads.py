import asyncio
import hashlib
import os
import shutil
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from loramux_server.errors import (
    FailedPrecondition,
    InvalidRequest,
    LoramuxServerError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.lora.upload_request import UploadLimits
from loramux_server.lora.upload_session import UploadSession, ValidatedAdapter
from loramux_server.lora.uploads import UploadSessions
from loramux_server.tenancy.records import FileRecord, VersionRecord, VersionState
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import CONFIG, FakeValidator, digest_of, upload_request

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
        started = await self.sessions.start(T, upload_request(data, **options))
        await self.send(started.upload_id, data, started.committed_bytes)
        return started.upload_id

    async def send(self, upload_id: str, data: bytes, offset: int = 0) -> None:
        for start in range(offset, len(data), 1024):
            await self.sessions.write(T, upload_id, start, data[start : start + 1024])

    async def finish(self, upload_id: str, tenant: str = T) -> VersionRecord:
        return await self.sessions.finish(tenant, upload_id, self.commit)

    def left(self) -> list[Path]:
        return list((self.root / ".uploads").iterdir())


@pytest.fixture
async def uploads(tmp_path: Path) -> AsyncIterator[Uploads]:
    made = Uploads(tmp_path)
    yield made
    made.sessions.check_integrity()
    await made.sessions.close()
    assert made.left() == []
    made.store.close()


async def refused(awaitable: Any, kind: type[LoramuxServerError], reason: Reason) -> LoramuxServerError:
    with pytest.raises(kind) as caught:
        await awaitable
    assert caught.value.reason is reason
    return caught.value


async def test_bytes_become_a_version(uploads: Uploads) -> None:
    upload_id = await uploads.upload()
    version = await uploads.finish(upload_id)
    directory = uploads.store.path(T, version.digest)
    assert (directory / "adapter_model.safetensors").read_bytes() == DATA
    assert (directory / "adapter_config.json").read_bytes() == CONFIG
    assert [file.name for file in version.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert version.files[1].sha256 == digest_of(DATA)


@pytest.mark.parametrize("cut", [0, 1, 1023, 1024, 1279])
async def test_a_broken_upload_goes_on_where_it_ended(uploads: Uploads, cut: int) -> None:
    request = upload_request(DATA)
    started = await uploads.sessions.start(T, request)
    for start in range(0, cut, 1024):
        await uploads.sessions.write(T, started.upload_id, start, DATA[start : min(start + 1024, cut)])
    resumed = await uploads.sessions.start(T, request)
    assert (resumed.upload_id, resumed.committed_bytes) == (started.upload_id, cut)
    assert (await uploads.sessions.get(T, started.upload_id)).committed_bytes == cut
    for start in range(cut, len(DATA), 1024):
        await uploads.sessions.write(T, started.upload_id, start, DATA[start : start + 1024])
    assert (await uploads.finish(started.upload_id)).digest == digest_of(DATA)


@pytest.mark.parametrize("offset", [0, 1023, 1025, 2**63])
async def test_a_wrong_offset_says_the_right_one(uploads: Uploads, offset: int) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    await uploads.sessions.write(T, started.upload_id, 0, DATA[:1024])
    error = await refused(
        uploads.sessions.write(T, started.upload_id, offset, b"x"), InvalidRequest, Reason.INVALID_PARAMETER
    )
    assert error.metadata["committed_bytes"] == "1024" and error.field == "offset"


async def test_chunks_and_total_are_bounded(uploads: Uploads) -> None:
    started = await uploads.sessions.start(T, upload_request(b"0123456789"))
    for data in (b"", b"x" * 1025, b"x" * 11):
        await refused(uploads.sessions.write(T, started.upload_id, 0, data), InvalidRequest, Reason.INVALID_PARAMETER)
    assert (await uploads.sessions.get(T, started.upload_id)).committed_bytes == 0


async def test_concurrent_writers_cannot_mix_bytes(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    real = os.pwrite

    def slow(descriptor: int, data: bytes, offset: int) -> int:
        time.sleep(0.01)  # long enough for the other threads to look at the offset
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    outcomes = await asyncio.gather(
        *(uploads.sessions.write(T, started.upload_id, 0, DATA[:1024]) for _ in range(8)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1
    await uploads.send(started.upload_id, DATA, 1024)
    await uploads.finish(started.upload_id)


async def test_an_incomplete_upload_cannot_be_finished(uploads: Uploads) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    await uploads.sessions.write(T, started.upload_id, 0, DATA[:1024])
    error = await refused(uploads.finish(started.upload_id), InvalidRequest, Reason.INVALID_PARAMETER)
    assert error.metadata["committed_bytes"] == "1024"


async def test_wrong_bytes_are_refused_and_can_be_sent_again(uploads: Uploads) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    await uploads.send(started.upload_id, DATA[:-1] + b"\0")
    error = await refused(uploads.finish(started.upload_id), InvalidRequest, Reason.DIGEST_MISMATCH)
    assert error.metadata["committed_bytes"] == "0"
    assert uploads.validator.calls == 0
    await uploads.send(started.upload_id, DATA)
    await uploads.finish(started.upload_id)


async def test_what_validation_refuses_stays_refused_and_leaves_no_bytes(uploads: Uploads) -> None:
    uploads.validator.error = FailedPrecondition(Reason.ADAPTER_NUMERICS, "a tensor holds NaN")
    upload_id = await uploads.upload()
    for _ in range(2):
        await refused(uploads.finish(upload_id), FailedPrecondition, Reason.ADAPTER_NUMERICS)
    assert uploads.validator.calls == 1 and uploads.commits == [] and uploads.left() == []
    await refused(uploads.sessions.write(T, upload_id, 0, b"x"), InvalidRequest, Reason.INVALID_PARAMETER)
    uploads.validator.error = None
    await uploads.finish(await uploads.upload())


async def test_a_kept_refusal_holds_nothing_of_the_calls_that_got_it(uploads: Uploads) -> None:
    uploads.validator.error = FailedPrecondition(Reason.ADAPTER_NUMERICS, "a tensor holds NaN")
    upload_id = await uploads.upload()
    depths = set()
    for _ in range(4):
        error = await refused(uploads.finish(upload_id), FailedPrecondition, Reason.ADAPTER_NUMERICS)
        depths.add(len(list(traceback.walk_tb(error.__traceback__))))
    assert max(depths) < 8 and len(depths) <= 2


async def test_a_passing_failure_can_be_retried(uploads: Uploads) -> None:
    uploads.validator.error = Unavailable(Reason.STORE_UNAVAILABLE, "the worker died")
    upload_id = await uploads.upload()
    await refused(uploads.finish(upload_id), Unavailable, Reason.STORE_UNAVAILABLE)
    uploads.validator.error = None
    await uploads.finish(upload_id)


async def test_a_bug_in_validation_can_be_retried_and_is_logged(
    uploads: Uploads, caplog: pytest.LogCaptureFixture
) -> None:
    upload_id = await uploads.upload()

    async def broken(session: UploadSession, validated: ValidatedAdapter) -> VersionRecord:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await uploads.sessions.finish(T, upload_id, broken)
    assert "validation of an upload broke" in caplog.text
    await uploads.finish(upload_id)


async def test_everyone_who_finishes_gets_the_one_outcome(uploads: Uploads) -> None:
    uploads.validator.gate = asyncio.Event()
    upload_id = await uploads.upload()
    waiting = [asyncio.create_task(uploads.finish(upload_id)) for _ in range(3)]
    await asyncio.sleep(0)
    await refused(uploads.sessions.write(T, upload_id, 0, b"x"), InvalidRequest, Reason.INVALID_PARAMETER)
    uploads.validator.gate.set()
    versions = await asyncio.gather(*waiting)
    assert versions == [await uploads.finish(upload_id)] * 3
    assert uploads.validator.calls == len(uploads.commits) == 1


async def test_validation_goes_on_when_the_caller_leaves(uploads: Uploads) -> None:
    uploads.validator.gate = asyncio.Event()
    upload_id = await uploads.upload()
    caller = asyncio.create_task(uploads.finish(upload_id))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    uploads.validator.gate.set()
    assert (await uploads.finish(upload_id)).digest == digest_of(DATA)
    assert uploads.validator.calls == 1


async def test_uploads_belong_to_their_tenant(uploads: Uploads) -> None:
    upload_id = await uploads.upload()
    calls = [
        uploads.sessions.get("acme", upload_id),
        uploads.sessions.write("acme", upload_id, 0, b"x"),
        uploads.finish(upload_id, "acme"),
        uploads.sessions.get(T, "../" + upload_id),
        uploads.sessions.get(T, ""),
    ]
    texts = {(await refused(call, NotFound, Reason.UPLOAD_NOT_FOUND)).message for call in calls}
    assert len(texts) == 1
    theirs = await uploads.sessions.start("acme", upload_request(DATA))
    assert theirs.upload_id != upload_id and theirs.committed_bytes == 0


async def test_an_abandoned_upload_makes_room_for_another(uploads: Uploads) -> None:
    first = await uploads.sessions.start(T, upload_request(b"a" * 1000))
    second = await uploads.sessions.start(T, upload_request(b"b" * 1000))
    uploads.now += 59
    await uploads.sessions.write(T, second.upload_id, 0, b"b" * 10)
    await refused(uploads.sessions.start(T, upload_request(b"c")), ResourceExhausted, Reason.TENANT_QUOTA)
    uploads.now += 2
    again = await uploads.sessions.start(T, upload_request(b"a" * 1000))
    assert again.upload_id == first.upload_id, "a caller that comes back finds its upload, idle or not"
    third = await uploads.sessions.start(T, upload_request(b"c"))
    assert (await uploads.sessions.get(T, second.upload_id)).committed_bytes == 10
    assert (await uploads.sessions.get(T, third.upload_id)).committed_bytes == 0
    await refused(uploads.sessions.get(T, first.upload_id), NotFound, Reason.UPLOAD_NOT_FOUND)
    uploads.now += 61
    await uploads.sessions.start(T, upload_request(b"d" * 2500))
    await refused(uploads.sessions.get(T, second.upload_id), NotFound, Reason.UPLOAD_NOT_FOUND)


async def test_quota_counts_uploads_and_bytes_of_one_tenant(uploads: Uploads) -> None:
    await uploads.sessions.start(T, upload_request(b"a" * 1000))
    await refused(uploads.sessions.start(T, upload_request(b"b" * 2000)), ResourceExhausted, Reason.TENANT_QUOTA)
    second = await uploads.upload(b"c" * 500)
    await refused(uploads.sessions.start(T, upload_request(b"d")), ResourceExhausted, Reason.TENANT_QUOTA)
    await uploads.sessions.start("acme", upload_request(b"d"))
    await uploads.finish(second)
    await uploads.sessions.start(T, upload_request(b"d"))


async def test_concurrent_starts_cannot_pass_the_quota_together(uploads: Uploads) -> None:
    outcomes = await asyncio.gather(
        *(uploads.sessions.start(T, upload_request(bytes([n]))) for n in range(10)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 2
    assert len(uploads.left()) == 2


async def test_a_second_start_waits_until_the_first_has_opened(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = LocalStore.new_upload

    def slow(store: LocalStore) -> Path:
        time.sleep(0.05)
        return real(store)

    monkeypatch.setattr(LocalStore, "new_upload", slow)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of somebody else")
    first = asyncio.create_task(uploads.sessions.start(T, upload_request(DATA)))
    await asyncio.sleep(0)
    second = await uploads.sessions.start(T, upload_request(DATA))
    await uploads.send(second.upload_id, DATA)
    assert (await first).upload_id == second.upload_id
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"of somebody else"
    await uploads.finish(second.upload_id)


async def test_a_caller_that_leaves_a_start_leaves_no_stray_directory(uploads: Uploads) -> None:
    for _ in range(5):
        start = asyncio.create_task(uploads.sessions.start(T, upload_request(DATA)))
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    resumed = await uploads.sessions.start(T, upload_request(DATA))
    assert len(uploads.left()) == 1
    await uploads.send(resumed.upload_id, DATA)
    await uploads.finish(resumed.upload_id)


async def test_a_start_that_fails_leaves_neither_place_nor_directory(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", _full_disk)
        await refused(uploads.sessions.start(T, upload_request(DATA)), Unavailable, Reason.STORE_UNAVAILABLE)
    assert uploads.left() == []
    for name in (b"a", b"b"):
        await uploads.sessions.start(T, upload_request(name))


async def test_an_expired_upload_that_cannot_be_removed_bothers_nobody_else(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await uploads.sessions.start(T, upload_request(DATA))
    stays = uploads.left()
    uploads.now = 4600.0
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", _full_disk)
        await uploads.sessions.start("acme", upload_request(b"x"))
    await refused(uploads.sessions.get(T, old.upload_id), NotFound, Reason.UPLOAD_NOT_FOUND)
    for directory in stays:
        uploads.store.discard_upload(directory)


async def test_bytes_for_an_upload_that_has_just_gone_are_refused_as_such(uploads: Uploads) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    session = uploads.sessions._sessions[started.upload_id]
    with session.lock:
        write = asyncio.create_task(uploads.sessions.write(T, started.upload_id, 0, DATA[:1024]))
        await asyncio.sleep(0.01)
        session.closed = True
    await refused(write, NotFound, Reason.UPLOAD_NOT_FOUND)
    session.closed = False


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


async def test_an_upload_ends_after_its_hour(uploads: Uploads) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    assert started.expire_time == 4600.0
    uploads.now = 4599.0
    await uploads.sessions.get(T, started.upload_id)
    uploads.now = 4600.0
    await refused(uploads.sessions.get(T, started.upload_id), NotFound, Reason.UPLOAD_NOT_FOUND)
    assert uploads.left() == []


async def test_validation_may_outlast_the_hour(uploads: Uploads) -> None:
    uploads.validator.gate = asyncio.Event()
    upload_id = await uploads.upload()
    finishing = asyncio.create_task(uploads.finish(upload_id))
    await asyncio.sleep(0)
    uploads.now = 10_000.0
    await uploads.sessions.expire()
    uploads.validator.gate.set()
    assert (await finishing).digest == digest_of(DATA)


async def test_bytes_that_the_tenant_has_are_not_sent_again(uploads: Uploads) -> None:
    version = await uploads.finish(await uploads.upload())
    uploads.known = uploads.store.path(T, version.digest) / "adapter_model.safetensors"
    again = await uploads.sessions.start(T, upload_request(DATA, adapter="other"))
    assert again.committed_bytes == again.total_bytes == len(DATA)
    assert (await uploads.finish(again.upload_id)).digest == version.digest


async def test_a_known_file_that_is_gone_is_sent(uploads: Uploads) -> None:
    uploads.known = uploads.root / "gone"
    await uploads.finish(await uploads.upload())


async def test_a_full_disk_leaves_the_committed_bytes(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    started = await uploads.sessions.start(T, upload_request(DATA))
    await uploads.sessions.write(T, started.upload_id, 0, DATA[:1024])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", str(uploads.root))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        error = await refused(
            uploads.sessions.write(T, started.upload_id, 1024, DATA[1024:]), Unavailable, Reason.STORE_UNAVAILABLE
        )
    assert str(uploads.root) not in error.message
    await uploads.send(started.upload_id, DATA, 1024)
    await uploads.finish(started.upload_id)


async def test_a_short_write_is_completed(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:100], offset))
    upload_id = await uploads.upload()
    assert (await uploads.finish(upload_id)).files[1].sha256 == hashlib.sha256(DATA).hexdigest()


async def test_close_ends_a_validation(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    uploads.validator.gate = asyncio.Event()
    upload_id = await uploads.upload()
    finishing = asyncio.create_task(uploads.finish(upload_id))
    await asyncio.sleep(0)
    await uploads.sessions.close()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert uploads.left() == []
    uploads.store.close()
