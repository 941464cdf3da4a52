"""Bytes of an upload: written, resumed, validated, finished."""

import asyncio
import hashlib
import os
import time
import traceback
from pathlib import Path

import pytest

from loramux_server.errors import FailedPrecondition, InvalidRequest, Reason, Unavailable
from loramux_server.lora.upload_session import UploadSession, ValidatedAdapter
from loramux_server.tenancy.records import VersionRecord
from tests.support.lifecycle_doubles import CONFIG, digest_of, upload_request
from tests.support.upload_sessions import DATA, T, Uploads, refused


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


async def test_validation_may_outlast_the_hour(uploads: Uploads) -> None:
    uploads.validator.gate = asyncio.Event()
    upload_id = await uploads.upload()
    finishing = asyncio.create_task(uploads.finish(upload_id))
    await asyncio.sleep(0)
    uploads.now = 10_000.0
    await uploads.sessions.expire()
    uploads.validator.gate.set()
    assert (await finishing).digest == digest_of(DATA)


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
