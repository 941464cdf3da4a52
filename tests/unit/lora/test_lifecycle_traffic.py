"""Traffic of an adapter, and what requests resolve to."""

import asyncio
from pathlib import Path

import pytest

from loramux_server.engine.messages import PutAlias, PutVersion
from loramux_server.errors import (
    AccessDenied,
    Conflict,
    InvalidRequest,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.tenancy.names import version_key
from tests.support.adapter_life import BOT, BOT_NAME, Life, T, idem, key_of, running, version
from tests.support.lifecycle_doubles import digest_of

# --- traffic ---------------------------------------------------------------------------------------------------------


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
