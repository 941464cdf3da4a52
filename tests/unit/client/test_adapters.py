"""Adapter calls against the fake server: traffic, reads, usage and watches."""

import threading
from datetime import UTC, datetime, timedelta

import pytest

from loramux import (
    AdapterEventKind,
    AdapterNotFound,
    AsyncClient,
    Client,
    ClientStateError,
    Conflict,
    InvalidRequest,
    NotFound,
    ResidencyLevel,
    TrafficTarget,
    VersionState,
)
from loramux.testing import FakeServer


class TestTraffic:
    def test_promote_rollback_split(self, server: FakeServer, client: Client) -> None:
        old, new = (server.add_adapter("bot", content=text, promote=False) for text in ("old", "new"))
        adapters = client.adapters
        assert adapters.promote("bot", old).serving_version == old
        assert adapters.promote("bot", new.rpartition("/")[2]).serving_version == new
        assert adapters.rollback("bot").serving_version == old
        assert adapters.rollback("bot").serving_version == new
        assert adapters.promote("bot", f"bot@{old.rpartition('/')[2]}").serving_version == old
        split = adapters.set_traffic("bot", {old: 9, new: 1})
        assert split.traffic == (TrafficTarget(version=old, weight=9), TrafficTarget(version=new, weight=1))
        assert split.serving_version == old
        assert adapters.set_traffic("bot", [(adapters.get_version("bot", new), 1)]).serving_version == new
        assert adapters.set_traffic("bot", {}).serving_version is None

    def test_rollback_needs_somewhere_to_go(self, server: FakeServer, client: Client) -> None:
        server.add_adapter("bot")
        with pytest.raises(Conflict, match="no previous version"):
            client.adapters.rollback("bot")

    def test_a_stale_etag_is_a_conflict(self, server: FakeServer, client: Client) -> None:
        version = server.add_adapter("bot")
        etag = client.adapters.get("bot").etag
        client.adapters.set_labels("bot", {"a": "b"}, etag=etag)
        with pytest.raises(Conflict) as caught:
            client.adapters.promote("bot", version, etag=etag)
        assert caught.value.reason == "VERSION_CONFLICT"

    def test_pin(self, server: FakeServer, client: Client) -> None:
        version = server.add_adapter("bot")
        until = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
        pinned = client.adapters.pin("bot", expire_time=until)
        assert pinned.pin is not None
        assert (pinned.pin.version, pinned.pin.expire_time) == (version, until)
        assert client.adapters.unpin("bot").pin is None
        with pytest.raises(InvalidRequest, match="time zone"):
            client.adapters.pin("bot", expire_time=datetime(2030, 1, 1))  # noqa: DTZ001  the point of the test

    def test_preload_and_unload(self, server: FakeServer, client: Client) -> None:
        version = server.add_adapter("bot")
        [entry] = client.adapters.preload("bot")
        assert (entry.version, entry.level) == (version, ResidencyLevel.DEVICE)
        [entry] = client.adapters.preload("bot", level=ResidencyLevel.HOST)
        assert entry.level is ResidencyLevel.HOST
        with pytest.raises(InvalidRequest, match="level"):
            client.adapters.preload("bot", level=ResidencyLevel.STORE)
        [entry] = client.adapters.unload("bot")
        assert entry.level is ResidencyLevel.STORE

    def test_empty_names_never_leave(self, server: FakeServer, client: Client) -> None:
        adapters = client.adapters
        for use in (
            lambda: adapters.get(""),
            lambda: adapters.delete(""),
            lambda: adapters.unload(""),
            lambda: adapters.promote("", "v"),
            lambda: adapters.promote("bot", ""),
            lambda: adapters.revoke(""),
        ):
            with pytest.raises(InvalidRequest, match="is empty"):
                use()
        assert not server.calls


class TestReading:
    def test_pages_are_read_as_needed(self, server: FakeServer, client: Client) -> None:
        for index in range(7):
            server.add_adapter(f"bot-{index}")
        listed = client.adapters.list(prefix="bot-", page_size=3)
        assert not server.calls
        next(listed)
        assert len(server.calls) == 1
        assert len(list(listed)) == 6
        assert len(server.calls) == 3
        assert list(client.adapters.list(prefix="other")) == []

    async def test_pages_async(self, server: FakeServer, async_client: AsyncClient) -> None:
        for index in range(7):
            server.add_adapter("bot", content=str(index))
        names = [version.name async for version in async_client.adapters.versions("bot", page_size=3)]
        assert len(set(names)) == 7
        assert len(server.calls) == 3

    def test_versions_and_states(self, server: FakeServer, client: Client) -> None:
        old, new = (server.add_adapter("bot", content=text) for text in ("old", "new"))
        assert [version.name for version in client.adapters.versions("bot")] == [new, old]
        with pytest.raises(Conflict) as caught:
            client.adapters.delete_version("bot", new)
        assert caught.value.reason == "VERSION_IN_USE"
        assert client.adapters.delete_version("bot", old).state is VersionState.DELETED
        assert [version.name for version in client.adapters.versions("bot")] == [new]
        [gone] = client.adapters.versions("bot", states=[VersionState.DELETED])
        assert gone.name == old

    def test_delete(self, server: FakeServer, client: Client) -> None:
        server.add_adapter("bot")
        client.adapters.delete("bot")
        with pytest.raises(AdapterNotFound):
            client.adapters.get("bot")

    def test_tenants_do_not_see_each_other(self, server: FakeServer, client: Client) -> None:
        server.add_adapter("bot", tenant="acme")
        assert client.for_tenant("acme").adapters.get("bot").name == "tenants/acme/adapters/bot"
        with pytest.raises(AdapterNotFound):
            client.adapters.get("bot")
        with pytest.raises(AdapterNotFound):
            client.adapters.get("tenants/acme/adapters/bot")

    def test_grants(self, server: FakeServer, client: Client) -> None:
        server.add_adapter("bot", tenant="acme")
        owner, guest = client.for_tenant("acme").adapters, client.for_tenant("guest")
        grant = owner.grant("bot", "guest")
        assert [entry.name for entry in owner.grants()] == [grant.name]
        assert guest.generate("Hi", adapter=grant.adapter).result().text == "Hi"
        owner.revoke(grant)
        assert list(owner.grants("bot")) == []
        with pytest.raises(AdapterNotFound):
            guest.generate("Hi", adapter=grant.adapter).result()
        with pytest.raises(NotFound):
            owner.revoke(grant)


class TestUsage:
    def test_entries_by_version(self, server: FakeServer, client: Client) -> None:
        version = server.add_adapter("bot")
        for prompt in ("ab", "cde"):
            client.generate(prompt, adapter="bot").result()
        client.generate("x").result()
        client.for_tenant("acme").generate("not ours").result()
        base, bot = client.adapters.usage(page_size=1)
        assert (base.version, base.requests) == ("", 1)
        assert (bot.version, bot.requests, bot.input_tokens, bot.output_tokens) == (version, 2, 5, 5)
        assert [entry.version for entry in client.adapters.usage(name="bot")] == [version]
        assert len(server.calls_of("GetTenantUsage")) == 3

    def test_a_span_has_a_time_zone(self, server: FakeServer, client: Client) -> None:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        list(client.adapters.usage(start=start, end=start + timedelta(days=1)))
        [call] = server.calls
        assert call.request.end_time.seconds - call.request.start_time.seconds == 86400
        with pytest.raises(InvalidRequest, match="start"):
            list(client.adapters.usage(start=datetime(2026, 1, 1)))  # noqa: DTZ001  the point of the test


class TestWatch:
    def test_snapshot_then_changes(self, server: FakeServer, client: Client) -> None:
        old = server.add_adapter("bot")
        with client.adapters.watch() as events:
            first = next(events)
            assert (first.kind, first.name) == (AdapterEventKind.SNAPSHOT, "tenants/default/adapters/bot")
            assert first.adapter is not None and first.adapter.serving_version == old
            assert next(events).kind is AdapterEventKind.SNAPSHOT_COMPLETE
            client.adapters.set_labels("bot", {"a": "b"})
            changed = next(events)
            assert changed.kind is AdapterEventKind.CHANGED
            assert changed.adapter is not None and changed.adapter.labels == {"a": "b"}
            assert changed.revision > first.revision
            client.adapters.delete("bot")
            assert (next(events).kind, changed.name) == (AdapterEventKind.DELETED, first.name)
        [call] = server.calls_of("WatchAdapters")
        assert call.ended.wait(10)
        assert call.cancelled

    def test_is_read_inside_of_its_block(self, server: FakeServer, client: Client) -> None:
        watch = client.adapters.watch()
        with pytest.raises(ClientStateError, match="inside of its block"):
            next(watch)
        assert not server.calls
        with watch:
            pass
        with pytest.raises(ClientStateError):
            iter(watch)
        with pytest.raises(ClientStateError, match="entered once"):
            watch.__enter__()

    def test_cancel_from_another_thread(self, server: FakeServer, client: Client) -> None:
        with client.adapters.watch() as events:
            next(events)
            timer = threading.Timer(0.05, events.cancel)
            timer.start()
            with pytest.raises(Exception, match="(?i)cancel"):
                next(events)
            timer.join()

    async def test_async(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.add_adapter("bot")
        kinds = []
        async with async_client.adapters.watch(prefix="b") as events:
            async for event in events:
                kinds.append(event.kind)
                if event.kind is AdapterEventKind.SNAPSHOT_COMPLETE:
                    break
        assert kinds == [AdapterEventKind.SNAPSHOT, AdapterEventKind.SNAPSHOT_COMPLETE]
