"""Versions from upload to deletion, and where they are resident."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loramux_server.engine.messages import PutAlias, PutVersion
from loramux_server.engine.messages import VersionState as VersionStateEvent
from loramux_server.errors import FailedPrecondition, InvalidRequest, NotFound, Reason, ResourceExhausted, Unavailable
from loramux_server.tenancy.changes import RegistryLimits
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import VersionState
from loramux_server.tenancy.store import LocalStore
from tests.support.adapter_life import BOT, BOT_NAME, Life, T, idem, key_of, running, version
from tests.support.lifecycle_doubles import digest_of, upload_request

# --- uploads ---------------------------------------------------------------------------------------------------------


async def test_an_upload_reaches_store_registry_and_engine(life: Life) -> None:
    record = await life.upload("v1")
    assert record.state is VersionState.READY and life.stored("v1")
    assert life.engine.journal == [("put_version", key_of("v1")), ("put_alias", BOT_NAME)]
    spec = life.engine.versions[0]
    assert (spec.digest, spec.version) == (digest_of("v1"), key_of("v1"))
    assert (Path(spec.path) / "adapter_model.safetensors").read_text() == "v1"
    assert life.engine.aliases[0].targets == [] and life.cycle.revision == 1


async def test_finish_replays_by_key_after_the_session_is_gone(life: Life) -> None:
    record = await life.upload("v1", key=idem("FinishAdapterUpload"))
    assert await life.cycle.finish_upload(T, "gone", key=idem("FinishAdapterUpload")) == record
    with pytest.raises(InvalidRequest) as caught:
        await life.cycle.finish_upload(T, "gone", key=idem("FinishAdapterUpload", b"other"))
    assert caught.value.reason is Reason.IDEMPOTENCY_MISMATCH


async def test_equal_bytes_are_uploaded_once(life: Life) -> None:
    first = await life.upload("v1")
    upload = await life.cycle.start_upload(T, upload_request(b"v1", "bot"))
    assert upload.committed_bytes == upload.total_bytes
    assert await life.cycle.finish_upload(T, upload.upload_id) == first
    other = await life.upload("v1", adapter="other")
    assert other.digest == first.digest and life.stored("v1")


async def test_a_full_registry_refuses_before_and_after_the_bytes(tmp_path: Path) -> None:
    async with running(tmp_path, RegistryLimits(adapters=1)) as life:
        early = await life.cycle.start_upload(T, upload_request(b"x", "late"))
        await life.upload("v1")
        with pytest.raises(ResourceExhausted):
            await life.cycle.start_upload(T, upload_request(b"y", "third"))
        await life.cycle.write_upload(T, early.upload_id, 0, b"x")
        with pytest.raises(ResourceExhausted):
            await life.cycle.finish_upload(T, early.upload_id)
        assert not life.stored("x")
        await life.cycle.delete_adapter(T, BOT)
        assert (await life.cycle.finish_upload(T, early.upload_id)).adapter == "late"


async def test_a_commit_that_fails_gives_the_bytes_back_to_the_upload(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise Unavailable(Reason.STORE_UNAVAILABLE, "disk full")

    with monkeypatch.context() as patched:
        patched.setattr(life.registry, "commit_version", failing)
        with pytest.raises(Unavailable):
            await life.upload("v1")
    assert not life.stored("v1")
    assert await asyncio.to_thread(life.registry.recover) == []
    upload = await life.cycle.start_upload(T, upload_request(b"v1"))
    assert upload.committed_bytes == upload.total_bytes
    await life.cycle.finish_upload(T, upload.upload_id)
    assert life.stored("v1")
    assert list((life.root / "store" / ".uploads").iterdir()) == []


# --- deletion --------------------------------------------------------------------------------------------------------


async def test_a_commit_counts_although_its_left_overs_stay(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    await life.upload("v1")
    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "discard_upload", _away)
        made = await life.upload("v1", "other")
    assert life.cycle.table.state_of(T, AdapterReference(tenant=T, adapter="other")).versions == (made,)
    assert ("put_version", made.key) in life.engine.journal


def _away(*_: object) -> None:
    raise Unavailable(Reason.STORE_UNAVAILABLE, "the store is away")


async def test_a_deleted_version_leaves_the_store_when_the_engine_is_done(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    await life.move("v2")
    deletion = await life.cycle.delete_version(T, version("v1"))
    assert deletion.versions[0].state is VersionState.DRAINING
    assert life.engine.journal[-1] == ("drop_version", key_of("v1"))
    assert life.stored("v1")
    with pytest.raises(NotFound):
        life.cycle.table.resolve(T, f"bot@{digest_of('v1')}")
    life.dropped("v1")
    await life.settle()
    assert not life.stored("v1")
    assert (await asyncio.to_thread(life.registry.get_version, version("v1"))).state is VersionState.DELETED
    with pytest.raises(FailedPrecondition) as caught:
        await life.cycle.delete_version(T, version("v2"))
    assert caught.value.reason is Reason.VERSION_IN_USE


async def test_a_version_that_came_back_survives_the_end_of_its_drain(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    await life.cycle.delete_version(T, version("v1"))
    await life.upload("v1")
    assert life.engine.journal[-1] == ("put_version", key_of("v1"))
    life.cycle.table.check_integrity()
    life.dropped("v1")
    await life.settle()
    assert life.stored("v1")
    assert (life.cycle.table.resolve(T, f"bot@{digest_of('v1')[:16]}")).digest == digest_of("v1")


async def test_a_deleted_adapter_is_gone_at_once_and_drains(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v1", adapter="other")
    await life.move("v1")
    deletion = await life.cycle.delete_adapter(T, BOT)
    assert life.engine.journal[-2:] == [("drop_alias", BOT_NAME), ("drop_version", key_of("v1"))]
    assert deletion.revision == life.cycle.revision
    with pytest.raises(NotFound):
        life.cycle.table.resolve(T, "bot")
    life.dropped("v1")
    await life.settle()
    assert life.stored("v1"), "the other adapter uses the same object"


async def test_an_object_that_cannot_be_removed_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as life:
        await life.upload("v1")
        await life.cycle.delete_version(T, version("v1"))

        def failing(tenant: str, digest: str) -> None:
            raise Unavailable(Reason.STORE_UNAVAILABLE, "the disk is away")

        with monkeypatch.context() as patched:
            patched.setattr(life.store, "remove", failing)
            life.dropped("v1")
            await life.settle()
        assert "stays in the store until the next start" in caplog.text
        assert life.stored("v1")
        assert (await asyncio.to_thread(life.registry.get_version, version("v1"))).state is VersionState.DELETED
    async with running(tmp_path) as life:
        assert not life.stored("v1")


async def test_a_new_engine_process_ends_every_drain(life: Life) -> None:
    await life.upload("v1")
    await life.cycle.delete_version(T, version("v1"))
    assert life.stored("v1")
    assert all(not isinstance(command, PutVersion) for command in life.cycle.engine_state())
    await life.settle()
    assert not life.stored("v1")


# --- residency -------------------------------------------------------------------------------------------------------


async def test_preload_and_unload_follow_the_engine(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    await life.move("v1", warm=False)
    versions, seconds = await life.cycle.preload(T, BOT)
    assert [item.digest for item in versions] == [digest_of("v1")] and seconds >= 0
    assert life.cycle.table.residency(key_of("v1")).level == "gpu"
    await life.cycle.preload(T, version("v2"))
    life.cycle.on_version_state(VersionStateEvent(version=key_of("v2"), residency="host", references=0))
    assert life.cycle.table.resident("host", T) == 1 and life.cycle.table.resident("gpu") == 1
    unloaded = await life.cycle.unload(T, BOT)
    assert {item.digest for item in unloaded} == {digest_of("v1"), digest_of("v2")}
    assert life.cycle.table.residency(key_of("v1")).level == "store"
    assert life.cycle.table.residency(key_of("v2")).level == "host", "the engine may keep it in host memory"
    life.cycle.on_version_state(VersionStateEvent(version=key_of("v2"), residency="store", references=0))
    assert await life.cycle.unload(T, BOT) == []


async def test_unload_does_not_wait_for_running_requests(life: Life) -> None:
    await life.upload("v1")
    life.cycle.on_version_state(VersionStateEvent(version=key_of("v1"), residency="gpu", references=2))
    life.engine.gate = asyncio.Event()
    assert len(await life.cycle.unload(T, BOT)) == 1
    residency = life.cycle.table.residency(key_of("v1"))
    assert (residency.level, residency.references) == ("gpu", 2) and residency.last_used is not None
    life.engine.gate.set()
    await life.settle()
    assert life.cycle.table.residency(key_of("v1")).level == "store"


async def test_repeated_unloads_do_not_pile_up(life: Life) -> None:
    await life.upload("v1")
    life.cycle.on_version_state(VersionStateEvent(version=key_of("v1"), residency="gpu", references=1))
    life.engine.gate = asyncio.Event()
    for _ in range(3):
        assert len(await life.cycle.unload(T, BOT)) == 1
    assert life.engine.journal.count(("unload", key_of("v1"))) == 1
    life.engine.gate.set()
    await life.settle()
    life.cycle.on_version_state(VersionStateEvent(version=key_of("v1"), residency="gpu", references=0))
    await life.cycle.unload(T, BOT)
    assert life.engine.journal.count(("unload", key_of("v1"))) == 2


async def test_preload_without_an_engine_is_refused(life: Life) -> None:
    await life.upload("v1")
    life.engine.error = Unavailable(Reason.ENGINE_UNAVAILABLE, "restarting")
    with pytest.raises(Unavailable):
        await life.cycle.preload(T, version("v1"))
    with pytest.raises(NotFound):
        await life.cycle.preload("acme", version("v1"))


async def test_a_revision_is_waited_for_and_not_for_long(life: Life) -> None:
    table = life.cycle.table
    assert await table.reaches(0, 0.0)
    waiting = asyncio.create_task(table.reaches(1, 5.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await life.upload("v1")
    assert await waiting
    assert not await table.reaches(2, 0.01)


async def test_a_lost_engine_holds_nothing(life: Life) -> None:
    await life.upload("v1")
    await life.cycle.preload(T, version("v1"))
    life.cycle.engine_lost()
    assert life.cycle.table.resident("gpu") == 0


async def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    async with running(tmp_path) as life:
        await life.upload("v1")
        await life.move("v1")
        salt = life.cycle.table.tenant(T).salt
        before = dict(life.cycle.table.adapters)
    async with running(tmp_path) as life:
        assert life.cycle.table.adapters == before and life.cycle.revision == 2
        assert life.cycle.table.tenant(T).salt == salt and life.stored("v1")
        assert [type(command) for command in life.cycle.engine_state()] == [PutVersion, PutAlias]
