import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loramux_server.engine.messages import PutAlias, PutVersion
from loramux_server.engine.messages import VersionState as VersionStateEvent
from loramux_server.errors import (
    AccessDenied,
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.tenancy.changes import RegistryLimits
from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import AdapterReference, version_key
from loramux_server.tenancy.records import VersionRecord, VersionState
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import FakeEngine, FakeValidator, digest_of, upload_request

T = "default"
BOT = AdapterReference(tenant=T, adapter="bot")


class Life:
    def __init__(self, root: Path, limits: RegistryLimits | None = None) -> None:
        self.root = root
        self.engine = FakeEngine()
        self.validator = FakeValidator()
        self.registry = Registry(root / "registry.sqlite", limits=limits)
        self.store = LocalStore(root / "store")
        self.cycle = AdapterLifecycle(
            self.registry, self.store, self.validator, self.engine, heartbeat=0.05, unload_wait=0.05
        )

    async def upload(self, content: str, adapter: str = "bot", **options: Any) -> VersionRecord:
        data = content.encode()
        upload = await self.cycle.start_upload(T, upload_request(data, adapter))
        if upload.committed_bytes < len(data):
            await self.cycle.write_upload(T, upload.upload_id, 0, data)
        return await self.cycle.finish_upload(T, upload.upload_id, **options)

    async def move(self, *contents: str, adapter: str = "bot", **options: Any) -> Any:
        traffic = [(version(content, adapter), 1) for content in contents]
        return await self.cycle.update(T, AdapterReference(tenant=T, adapter=adapter), traffic=traffic, **options)

    def dropped(self, content: str, adapter: str = "bot") -> None:
        key = version_key(T, adapter, digest_of(content))
        self.cycle.on_version_state(VersionStateEvent(version=key, residency="store", references=0, dropped=True))

    def stored(self, content: str) -> bool:
        return self.store.contains(T, digest_of(content))

    async def settle(self) -> None:
        """Wait until nothing but the sweep is left to do."""
        async with asyncio.timeout(10):
            while pending := [task for task in self.cycle._tasks if "_sweep" not in repr(task.get_coro())]:
                await asyncio.wait(pending)


@asynccontextmanager
async def running(root: Path, limits: RegistryLimits | None = None) -> AsyncIterator[Life]:
    life = Life(root, limits)
    await life.cycle.start()
    try:
        yield life
        life.cycle.table.check_integrity()
        await asyncio.to_thread(life.registry.check_integrity)
    finally:
        await life.cycle.close()


@pytest.fixture
async def life(tmp_path: Path) -> AsyncIterator[Life]:
    async with running(tmp_path) as made:
        yield made


def version(content: str, adapter: str = "bot") -> AdapterReference:
    return AdapterReference(tenant=T, adapter=adapter, version=digest_of(content))


def key_of(content: str, adapter: str = "bot") -> str:
    return version_key(T, adapter, digest_of(content))


def idem(method: str = "UpdateAdapter", payload: bytes = b"p") -> IdempotencyKey:
    return IdempotencyKey(tenant=T, method=method, key="k", payload_hash=payload)


# --- uploads and the engine's table ----------------------------------------------------------------------------------


async def test_an_upload_reaches_store_registry_and_engine(life: Life) -> None:
    record = await life.upload("v1")
    assert record.state is VersionState.READY and life.stored("v1")
    assert life.engine.journal == [("put_version", key_of("v1")), ("put_alias", BOT_NAME)]
    spec = life.engine.versions[0]
    assert (spec.digest, spec.version) == (digest_of("v1"), key_of("v1"))
    assert (Path(spec.path) / "adapter_model.safetensors").read_text() == "v1"
    assert life.engine.aliases[0].targets == [] and life.cycle.revision == 1


BOT_NAME = "tenants/default/adapters/bot"


async def test_promote_warms_then_flips(life: Life) -> None:
    await life.upload("v1")
    record = await life.move("v1")
    assert life.engine.journal[-2:] == [("preload", key_of("v1")), ("put_alias", BOT_NAME)]
    alias = life.engine.aliases[-1]
    assert alias.targets == [(key_of("v1"), 1.0)] and alias.revision == record.revision == 2


async def test_only_versions_that_enter_the_traffic_are_warmed(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    await life.move("v1")
    life.engine.journal.clear()
    await life.move("v1", "v2")
    assert [entry for entry in life.engine.journal if entry[0] == "preload"] == [("preload", key_of("v2"))]
    life.engine.journal.clear()
    await life.move("v2", warm=False)
    assert ("preload", key_of("v2")) not in life.engine.journal


async def test_nothing_flips_before_the_version_is_resident(life: Life) -> None:
    await life.upload("v1")
    life.engine.gate = asyncio.Event()
    moving = asyncio.create_task(life.move("v1"))
    await asyncio.sleep(0.02)
    assert life.cycle.table.adapters[T, "bot"].adapter.traffic == ()
    life.engine.gate.set()
    await moving


async def test_a_version_that_does_not_fit_leaves_the_traffic(life: Life) -> None:
    await life.upload("v1")
    life.engine.error = ResourceExhausted(Reason.ADAPTER_SLOTS_EXHAUSTED, "all slots are pinned")
    with pytest.raises(ResourceExhausted):
        await life.move("v1")
    assert (await asyncio.to_thread(life.registry.get_adapter, T, "bot")).traffic == ()


async def test_without_an_engine_traffic_moves_and_a_resync_brings_it(life: Life) -> None:
    life.engine.error = Unavailable(Reason.ENGINE_UNAVAILABLE, "restarting")
    await life.upload("v1")
    await life.upload("v2")
    await life.move("v1")
    await life.upload("x", adapter="other")
    commands = life.cycle.engine_state()
    versions = [command.spec.version for command in commands if isinstance(command, PutVersion)]
    aliases = [command.spec for command in commands if isinstance(command, PutAlias)]
    assert set(versions) == {key_of("v1"), key_of("v2"), key_of("x", "other")}
    assert [alias.revision for alias in aliases] == sorted(alias.revision for alias in aliases)
    assert aliases[0].targets == [(key_of("v1"), 1.0)]
    kinds = [type(command) for command in commands]
    assert kinds == sorted(kinds, key=[PutVersion, PutAlias].index), "aliases need their versions"


async def test_a_stale_etag_warms_nothing(life: Life) -> None:
    await life.upload("v1")
    life.engine.journal.clear()
    with pytest.raises(Conflict):
        await life.move("v1", etag="stale")
    assert life.engine.journal == []


async def test_of_two_promotes_with_one_etag_one_wins_everywhere(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    etag = life.cycle.table.adapters[T, "bot"].adapter.etag
    outcomes = await asyncio.gather(life.move("v1", etag=etag), life.move("v2", etag=etag), return_exceptions=True)
    (winner,) = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 1
    assert life.engine.aliases[-1].targets == [(version_key(T, "bot", winner.serving), 1.0)]
    assert life.cycle.table.adapters[T, "bot"].adapter == winner


async def test_aliases_reach_the_engine_in_order_of_revision(life: Life) -> None:
    for name in ("a", "b", "c"):
        await life.upload("v1", adapter=name)
        await life.upload("v2", adapter=name)
    moves = [life.move(content, adapter=name) for content in ("v1", "v2") * 4 for name in ("a", "b", "c")]
    await asyncio.gather(*moves)
    revisions = [alias.revision for alias in life.engine.aliases]
    assert revisions == sorted(revisions) and len(set(revisions)) == len(revisions)
    assert life.cycle.revision == revisions[-1]


async def test_a_change_follows_through_although_its_caller_left(life: Life) -> None:
    await life.upload("v1")
    moving = asyncio.create_task(life.move("v1", warm=False))
    for _ in range(3):  # its commit is under way by then
        await asyncio.sleep(0)
    assert life.cycle._order.locked()
    moving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await moving
    await life.settle()
    stored = await asyncio.to_thread(life.registry.get_adapter, T, "bot")
    assert stored.serving == digest_of("v1")
    assert life.cycle.table.adapters[T, "bot"].adapter == stored
    assert life.engine.aliases[-1].targets == [(key_of("v1"), 1.0)]


async def test_traffic_must_name_ready_versions_of_the_adapter_once(life: Life) -> None:
    await life.upload("v1")
    await life.upload("x", adapter="other")
    with pytest.raises(InvalidRequest, match="twice"):
        await life.move("v1", "v1")
    with pytest.raises(NotFound):
        await life.move("v9")
    with pytest.raises(InvalidRequest, match="another adapter"):
        await life.cycle.update(T, BOT, traffic=[(version("x", "other"), 1)])
    with pytest.raises(NotFound):
        await life.cycle.update("acme", BOT, labels={})


async def test_a_replay_touches_neither_engine_nor_watches(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    first = await life.move("v1", key=idem())
    await life.move("v2")
    life.engine.journal.clear()
    assert await life.move("v1", key=idem()) == first
    assert life.engine.journal == []
    assert life.cycle.table.adapters[T, "bot"].adapter.serving == digest_of("v2")


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


# --- resolving -------------------------------------------------------------------------------------------------------


async def test_what_requests_resolve_to(life: Life) -> None:
    await life.upload("v1")
    await life.upload("v2")
    digest = digest_of("v1")
    with pytest.raises(NotFound, match="no version in its traffic"):
        life.cycle.table.resolve(T, "bot")
    await life.move("v1")
    for text in ("bot", BOT_NAME):
        resolved = life.cycle.table.resolve(T, text)
        assert (resolved.alias, resolved.version) == (BOT_NAME, None)
    for text in (f"bot@{digest[:16]}", f"bot@{digest}", f"{BOT_NAME}/versions/{digest[:16]}"):
        resolved = life.cycle.table.resolve(T, text)
        assert (resolved.alias, resolved.version, resolved.digest) == (None, key_of("v1"), digest)
    assert resolved.salt == life.cycle.table.tenant(T).salt and resolved.weight == 1.0
    base = life.cycle.table.resolve(T, None)
    assert (base.alias, base.version, base.digest) == (None, None, None)


async def test_unknown_and_foreign_adapters_answer_alike(life: Life) -> None:
    await life.upload("v1")
    texts = set()
    for name in ("nope", "tenants/acme/adapters/nope", "tenants/default/adapters/nope"):
        with pytest.raises(NotFound) as caught:
            life.cycle.table.resolve(T, name)
        texts.add((caught.value.message, tuple(caught.value.metadata.items())))
    assert len(texts) == 1
    with pytest.raises(NotFound):
        life.cycle.table.resolve(T, f"bot@{'0' * 16}")


@pytest.mark.parametrize("name", ["", "../bot", "bot@", "bot@x", "a" * 300, "bot\0", "tenants/default/adapters/"])
async def test_a_bad_name_is_invalid(life: Life, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        life.cycle.table.resolve(T, name, field="items[3].request.adapter")
    assert caught.value.field == "items[3].request.adapter"


async def test_absent_means_the_tenants_default(tmp_path: Path) -> None:
    async with running(tmp_path) as life:
        await life.upload("v1")
        await life.move("v1")
        await asyncio.to_thread(
            lambda: life.registry.configure_tenant(T, weight=1.0, default_adapter="bot", allow_base=False)
        )
    async with running(tmp_path) as life:
        assert (life.cycle.table.resolve(T, None)).alias == BOT_NAME
        await asyncio.to_thread(
            lambda: life.registry.configure_tenant(T, weight=1.0, default_adapter=None, allow_base=False)
        )
    async with running(tmp_path) as life:
        with pytest.raises(InvalidRequest, match="may not use the base model"):
            life.cycle.table.resolve(T, None)
        with pytest.raises(AccessDenied):
            life.cycle.table.resolve("acme", None)


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
