"""From when to when an upload exists: its start, its tenant's quota, its hour."""

import asyncio
import shutil
import threading
import time
from pathlib import Path

import pytest

from loramux_server.errors import NotFound, Reason, ResourceExhausted, Unavailable
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import upload_request
from tests.support.upload_sessions import DATA, T, Uploads, refused


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


async def test_a_caller_that_leaves_a_start_leaves_no_stray_directory(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = threading.Event()
    real = LocalStore.new_upload

    def held(store: LocalStore) -> Path:
        gone.wait(10)
        return real(store)

    monkeypatch.setattr(LocalStore, "new_upload", held)
    for _ in range(5):
        start = asyncio.create_task(uploads.sessions.start(T, upload_request(DATA)))
        await asyncio.sleep(0)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    gone.set()
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


async def test_bytes_that_the_tenant_has_are_not_sent_again(uploads: Uploads) -> None:
    version = await uploads.finish(await uploads.upload())
    uploads.known = uploads.store.path(T, version.digest) / "adapter_model.safetensors"
    again = await uploads.sessions.start(T, upload_request(DATA, adapter="other"))
    assert again.committed_bytes == again.total_bytes == len(DATA)
    assert (await uploads.finish(again.upload_id)).digest == version.digest


async def test_a_known_file_that_is_gone_is_sent(uploads: Uploads) -> None:
    uploads.known = uploads.root / "gone"
    await uploads.finish(await uploads.upload())
