"""Adapter calls against the fake server, upload and resume included."""

import hashlib
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loramux import (
    AdapterEventKind,
    AdapterNotFound,
    AsyncClient,
    Client,
    ClientStateError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ResidencyLevel,
    TrafficTarget,
    Unavailable,
    VersionState,
)
from loramux._upload import CHUNK_BYTES, local_adapter
from loramux.testing import FakeError, FakeServer
from tests.support.client_clock import FakeClock

CONFIG = b'{"peft_type": "LORA"}'


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory as PEFT saves it, of two and a half pieces, with a file that is nobody's business."""
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x07" * (2 * CHUNK_BYTES + CHUNK_BYTES // 2))
    (tmp_path / "loramux_manifest.json").write_bytes(b'{"base": "x"}')
    (tmp_path / "optimizer.pt").write_bytes(b"not to be sent")
    return tmp_path


class TestLocal:
    def test_reads_three_files(self, directory: Path) -> None:
        local = local_adapter(directory)
        data = (directory / "adapter_model.safetensors").read_bytes()
        assert (local.config, local.manifest) == (CONFIG, b'{"base": "x"}')
        assert (local.size, local.sha256) == (len(data), hashlib.sha256(data).hexdigest())

    def test_pieces_are_bounded_and_start_anywhere(self, directory: Path) -> None:
        local = local_adapter(str(directory))
        pieces = list(local.pieces("u", 0, None))
        assert [len(piece.data) for piece in pieces] == [CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES // 2]
        assert [piece.offset for piece in pieces] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
        seen: list[tuple[int, int]] = []
        [last] = local.pieces("u", local.size - 5, lambda sent, total: seen.append((sent, total)))
        assert (last.data, last.offset) == (b"\x07" * 5, local.size - 5)
        assert seen == [(local.size, local.size)]

    def test_a_pickle_is_refused_with_the_way_out(self, directory: Path) -> None:
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
        with pytest.raises(InvalidRequest, match="safe_serialization=True"):
            local_adapter(directory)

    def test_what_is_no_adapter(self, directory: Path) -> None:
        with pytest.raises(InvalidRequest, match="no directory"):
            local_adapter(directory / "nowhere")
        (directory / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(InvalidRequest, match="empty"):
            local_adapter(directory)
        (directory / "adapter_model.safetensors").unlink()
        with pytest.raises(InvalidRequest, match="no adapter_model.safetensors"):
            local_adapter(directory)
        (directory / "adapter_config.json").unlink()
        with pytest.raises(InvalidRequest, match=r"no adapter_config\.json"):
            local_adapter(directory)

    def test_a_huge_config_is_not_read(self, directory: Path) -> None:
        (directory / "adapter_config.json").write_bytes(b" " * (64 * 1024 + 1))
        with pytest.raises(InvalidRequest, match="adapter_config"):
            local_adapter(directory)


class TestUpload:
    def test_upload_and_promote(self, server: FakeServer, client: Client, directory: Path) -> None:
        version = client.adapters.upload(directory, name="bot", promote=True, labels={"team": "a"})
        assert version.state is VersionState.READY
        assert [file.name for file in version.files] == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "loramux_manifest.json",
        ]
        adapter = client.adapters.get("bot")
        assert adapter.serving_version == version.name
        assert adapter.labels == {"team": "a"}
        assert client.generate("Hi", adapter="bot").result().adapter_version == version.name

    def test_without_promote_it_does_not_serve(self, client: Client, directory: Path) -> None:
        version = client.adapters.upload(directory, name="bot")
        assert client.adapters.get("bot").serving_version is None
        assert client.adapters.upload(directory, name="bot").name == version.name

    def test_a_break_resumes_where_the_server_is(self, server: FakeServer, directory: Path) -> None:
        clock = FakeClock()
        sent: list[int] = []
        server.break_upload(after_bytes=CHUNK_BYTES + 1)
        with Client(server.address) as client:
            client._transport.clock = clock
            version = client.adapters.upload(directory, name="bot", progress=lambda done, _: sent.append(done))
        assert version.state is VersionState.READY
        assert len(server.calls_of("WriteAdapterUpload")) == 2
        assert len(server.calls_of("GetAdapterUpload")) == 1
        assert len(clock.slept) == 1
        size = (directory / "adapter_model.safetensors").stat().st_size
        assert sent[-1] == size

    async def test_a_break_resumes_where_the_server_is_async(self, server: FakeServer, directory: Path) -> None:
        clock = FakeClock()
        server.break_upload(after_bytes=CHUNK_BYTES + 1)
        async with AsyncClient(server.address) as client:
            client._transport.clock = clock
            version = await client.adapters.upload(directory, name="bot", promote=True)
            assert (await client.adapters.get("bot")).serving_version == version.name
        assert len(server.calls_of("WriteAdapterUpload")) == 2
        assert len(clock.slept) == 1

    def test_an_error_of_progress_reaches_its_owner(self, server: FakeServer, client: Client, directory: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            client.adapters.upload(directory, name="bot", progress=lambda done, total: print(1 // 0))
        assert client.adapters.upload(directory, name="bot").state is VersionState.READY

    async def test_an_error_of_progress_reaches_its_owner_async(self, server: FakeServer, directory: Path) -> None:
        async with AsyncClient(server.address) as client:
            with pytest.raises(ZeroDivisionError):
                await client.adapters.upload(directory, name="bot", progress=lambda done, total: print(1 // 0))
            assert (await client.adapters.upload(directory, name="bot")).state is VersionState.READY

    def test_a_lost_place_is_asked_for(self, server: FakeServer, client: Client, directory: Path) -> None:
        lost = FakeError("INVALID_ARGUMENT", "INVALID_PARAMETER", field_violations=[("offset", "is 0")])
        server.fail("WriteAdapterUpload", lost, lost)
        assert client.adapters.upload(directory, name="bot").state is VersionState.READY
        assert len(server.calls_of("GetAdapterUpload")) == 2
        server.fail("WriteAdapterUpload", *[lost] * 9)
        (directory / "adapter_model.safetensors").write_bytes(b"other")
        with pytest.raises(InvalidRequest):
            client.adapters.upload(directory, name="bot")
        assert len(server.calls_of("WriteAdapterUpload")) == 3 + 6

    def test_breaks_without_progress_end_it(self, server: FakeServer, directory: Path) -> None:
        server.fail("WriteAdapterUpload", *[FakeError("UNAVAILABLE")] * 20)
        with Client(server.address) as client:
            client._transport.clock = FakeClock()
            with pytest.raises(Unavailable):
                client.adapters.upload(directory, name="bot")
        assert len(server.calls_of("WriteAdapterUpload")) == 5

    def test_another_upload_of_the_same_files_goes_on(
        self, server: FakeServer, client: Client, directory: Path
    ) -> None:
        server.break_upload(after_bytes=2 * CHUNK_BYTES)
        server.fail("GetAdapterUpload", FakeError("INTERNAL"))
        with pytest.raises(Exception, match="scripted failure"):
            client.adapters.upload(directory, name="bot")
        sent: list[int] = []
        client.adapters.upload(directory, name="bot", progress=lambda done, _: sent.append(done))
        assert len(sent) == 1

    def test_a_refusal_of_the_start_sends_no_bytes(self, server: FakeServer, client: Client, directory: Path) -> None:
        server.fail("StartAdapterUpload", FakeError("INVALID_ARGUMENT", "INVALID_PARAMETER"))
        with pytest.raises(InvalidRequest):
            client.adapters.upload(directory, name="bot")
        assert not server.calls_of("WriteAdapterUpload")

    def test_a_file_that_changes_is_noticed(self, client: Client, directory: Path) -> None:
        def change(_: int, __: int) -> None:
            with (directory / "adapter_model.safetensors").open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x08")

        with pytest.raises(InvalidRequest) as caught:
            client.adapters.upload(directory, name="bot", progress=change)
        assert caught.value.reason == "DIGEST_MISMATCH"

    @pytest.mark.parametrize(
        ("timeout", "least", "most"), [(None, 3000, 3700), (500, 400, 600), (float("inf"), 1e6, None)]
    )
    def test_its_time_goes_to_every_call(
        self,
        server: FakeServer,
        client: Client,
        directory: Path,
        timeout: float | None,
        least: float,
        most: float | None,
    ) -> None:
        client.adapters.upload(directory, name="bot", timeout=timeout, promote=True)
        for call in server.calls:
            left = float("inf") if call.time_remaining is None else call.time_remaining
            assert left > least and (most is None or left < most), call.method

    def test_its_time_is_bounded(self, server: FakeServer, directory: Path) -> None:
        clock = FakeClock()
        server.fail("WriteAdapterUpload", FakeError("UNAVAILABLE", pushback_ms=5000))
        with Client(server.address) as client:
            client._transport.clock = clock
            with pytest.raises((Unavailable, DeadlineExceeded)):
                client.adapters.upload(directory, name="bot", timeout=3)
        assert clock.slept == []


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
