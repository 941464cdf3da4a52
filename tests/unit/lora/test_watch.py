import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from loramux_server.errors import Reason, ResourceExhausted
from loramux_server.lora.watch import Beat, Changed, Deleted, SnapshotEnd, SnapshotEntry, WatchEvent, WatchHub
from loramux_server.tenancy.records import AdapterRecord, AdapterState


class World:
    """Adapters that change by hand."""

    def __init__(self, heartbeat: float = 30.0, most: int = 64) -> None:
        self.states: dict[tuple[str, str], AdapterState] = {}
        self.revision = 0
        self.hub = WatchHub(lambda: self.states, lambda: self.revision, heartbeat=heartbeat, most=most)

    def put(self, adapter: str, tenant: str = "default") -> None:
        self.revision += 1
        record = AdapterRecord(
            tenant=tenant,
            adapter=adapter,
            traffic=(),
            previous="",
            labels={},
            revision=self.revision,
            create_time=0.0,
            update_time=0.0,
        )
        self.states[tenant, adapter] = AdapterState(adapter=record, versions=())
        self.hub.publish(tenant, adapter, self.revision)

    def delete(self, adapter: str, tenant: str = "default") -> None:
        self.revision += 1
        del self.states[tenant, adapter]
        self.hub.publish(tenant, adapter, self.revision)


def told(event: WatchEvent) -> tuple[str, int]:
    match event:
        case SnapshotEntry(state=state) | Changed(state=state):
            return (f"{type(event).__name__} {state.adapter.adapter}", event.revision)
        case Deleted(adapter=adapter):
            return (f"Deleted {adapter}", event.revision)
        case _:
            return (type(event).__name__, event.revision)


async def take(events: AsyncGenerator[WatchEvent, None], count: int) -> list[tuple[str, int]]:
    async with asyncio.timeout(5):
        return [told(await anext(events)) for _ in range(count)]


async def test_a_snapshot_by_revision_then_changes() -> None:
    world = World()
    for name in ("b", "a", "b"):
        world.put(name)
    async with aclosing(world.hub.watch("default", "")) as events:
        assert await take(events, 3) == [("SnapshotEntry a", 2), ("SnapshotEntry b", 3), ("SnapshotEnd", 3)]
        world.put("c")
        world.delete("a")
        assert await take(events, 2) == [("Changed c", 4), ("Deleted a", 5)]


async def test_an_empty_snapshot_is_complete() -> None:
    async with aclosing(World().hub.watch("default", "")) as events:
        assert await anext(events) == SnapshotEnd(revision=0, adapters=0)


async def test_changes_during_the_snapshot_are_not_lost() -> None:
    world = World()
    world.put("a")
    async with aclosing(world.hub.watch("default", "")) as events:
        assert await take(events, 1) == [("SnapshotEntry a", 1)]
        world.put("a")
        world.put("b")
        assert await take(events, 3) == [("SnapshotEnd", 1), ("Changed a", 2), ("Changed b", 3)]


async def test_a_slow_reader_gets_the_latest_state_once_in_order() -> None:
    world = World()
    world.put("a")
    async with aclosing(world.hub.watch("default", "")) as events:
        await take(events, 2)
        for _ in range(1000):
            world.put("a")
            world.put("b")
        world.put("a")
        assert len(next(iter(world.hub._watches)).dirty) == 2
        assert await take(events, 2) == [("Changed b", 2001), ("Changed a", 2002)]


async def test_what_came_and_went_unseen_is_not_told() -> None:
    world = World()
    async with aclosing(world.hub.watch("default", "")) as events:
        await take(events, 1)
        world.put("ghost")
        world.delete("ghost")
        world.put("real")
        assert await take(events, 1) == [("Changed real", 3)]


async def test_revisions_never_fall_when_residency_changes() -> None:
    world = World()
    world.put("old")
    world.put("new")
    async with aclosing(world.hub.watch("default", "")) as events:
        await take(events, 3)
        world.hub.publish("default", "old", 1)
        assert await take(events, 1) == [("Changed old", 2)]


async def test_only_the_tenants_adapters_with_the_prefix() -> None:
    world = World()
    world.put("team-a")
    world.put("team-b", tenant="acme")
    world.put("other")
    async with aclosing(world.hub.watch("default", "team-")) as events:
        assert await take(events, 2) == [("SnapshotEntry team-a", 1), ("SnapshotEnd", 3)]
        world.put("other")
        world.put("team-a", tenant="acme")
        world.put("team-c")
        assert await take(events, 1) == [("Changed team-c", 6)]


async def test_a_quiet_watch_beats() -> None:
    world = World(heartbeat=0.01)
    async with aclosing(world.hub.watch("default", "")) as events:
        await take(events, 1)
        assert isinstance(await anext(events), Beat)
        world.put("a")
        assert ("Changed a", 1) in await take(events, 20)


async def test_watches_are_counted_and_given_back() -> None:
    world = World(most=1)
    first = world.hub.watch("default", "")
    await anext(first)
    with pytest.raises(ResourceExhausted) as caught:
        await anext(world.hub.watch("default", ""))
    assert caught.value.reason is Reason.TENANT_QUOTA
    async with aclosing(world.hub.watch("acme", "")) as other:
        await anext(other)
    await first.aclose()
    assert world.hub.watches == 0


async def test_a_cancelled_reader_gives_its_watch_back() -> None:
    world = World()

    async def read() -> None:
        async with aclosing(world.hub.watch("default", "")) as events:
            async for _ in events:
                pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    assert world.hub.watches == 1
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert world.hub.watches == 0
