import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loramux_server.errors import FailedPrecondition, Reason, ResourceExhausted, Unavailable
from loramux_server.lora.adapter_directory import AdapterDirectory
from loramux_server.lora.directory_source import DirectorySource
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.upload_request import UploadLimits
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import AdapterState
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import CONFIG, FakeEngine, FakeValidator, digest_of

CONFIG_FILE, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Site:
    """An operator's directory, and a server that follows it: scans run when a test says so."""

    def __init__(self, root: Path, *, poll: float = 3600.0, patience: float = 60.0, age: float = 1e6) -> None:
        self.root = root / "adapters"
        self.root.mkdir(exist_ok=True)
        self.engine = FakeEngine()
        self.validator = FakeValidator()
        self.registry = Registry(root / "registry.db")
        self.registry.ensure_tenant("acme")
        self.cycle = AdapterLifecycle(
            self.registry,
            LocalStore(root / "store"),
            self.validator,
            self.engine,
            upload_limits=UploadLimits(chunk_bytes=4, adapter_bytes=10_000),
            allow_unverified=True,
        )
        self.age = age
        self.announced = asyncio.Event()
        self.source = DirectorySource(
            self.root,
            self.cycle,
            root / "store" / "directory.json",
            on_first_scan=self._announce,
            poll=poll,
            patience=patience,
            clock=lambda: time.time() + self.age,
        )

    async def _announce(self) -> None:
        self.announced.set()

    def put(self, path: str, content: str, config: bytes = CONFIG) -> Path:
        """Replace an adapter by renames, as an operator does."""
        target, new = self.root / path, self.root / f".{path.replace('/', '-')}"
        new.mkdir()
        (new / CONFIG_FILE).write_bytes(config)
        (new / TENSORS).write_text(content)
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        new.rename(target)
        return target

    async def scan(self) -> None:
        await self.source._scan()

    def state(self, path: str) -> AdapterState:
        tenant, _, adapter = path.partition("/")
        return self.cycle.table.adapters[tenant, adapter]

    def served(self, path: str) -> list[str]:
        return [target.digest for target in self.state(path).adapter.traffic]

    async def move(self, path: str, content: str) -> None:
        """What an operator does by RPC."""
        tenant, _, adapter = path.partition("/")
        version = AdapterReference(tenant=tenant, adapter=adapter, version=digest_of(content))
        await self.cycle.update(tenant, AdapterReference(tenant=tenant, adapter=adapter), traffic=[(version, 1)])


@asynccontextmanager
async def following(root: Path, *, poll: float = 3600.0, patience: float = 60.0) -> AsyncIterator[Site]:
    made = Site(root, poll=poll, patience=patience)
    await made.cycle.start()
    try:
        await made.source.open()
        yield made
        made.cycle.table.check_integrity()
        await asyncio.to_thread(made.registry.check_integrity)
    finally:
        await made.source.close()
        await made.cycle.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with following(tmp_path) as made:
        yield made


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """Log lines of the source that hold a text."""
    caplog.set_level(logging.INFO, logger="loramux_server.lora")
    return lambda text: [record.getMessage() for record in caplog.records if text in record.getMessage()]


Lines = Callable[[str], list[str]]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.01)


async def test_directories_become_versions_that_serve_and_nothing_is_written(site: Site, lines: Lines) -> None:
    bot = site.put("default/bot", "one, in several chunks")
    site.put("acme/bot", "two")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in site.root.rglob("*"))
    await site.scan()
    assert site.served("default/bot") == [digest_of("one, in several chunks")]
    assert site.served("acme/bot") == [digest_of("two")]
    assert ("preload", site.state("acme/bot").versions[0].key) in site.engine.journal
    assert site.validator.directories and not any(path.is_relative_to(site.root) for path in site.validator.directories)
    assert len(lines("default/bot is taken as version")) == 1
    revision = site.cycle.revision
    await site.scan()
    await site.scan()
    assert (site.cycle.revision, site.validator.calls) == (revision, 2)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in site.root.rglob("*")) == before
    assert (bot / TENSORS).read_text() == "one, in several chunks"


async def test_a_restart_makes_no_version_and_asks_no_worker(tmp_path: Path, lines: Lines) -> None:
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        await site.scan()
        revision = site.cycle.revision
    async with following(tmp_path) as site:
        await site.scan()
        assert (site.cycle.revision, site.validator.calls) == (revision, 0)
        assert site.served("default/bot") == [digest_of("v1")]
    assert len(lines("served already")) == 1


async def test_other_content_is_promoted_and_so_is_content_that_comes_back(site: Site) -> None:
    for content in ("v1", "v2", "v1"):
        site.put("default/bot", content)
        await site.scan()
        assert site.served("default/bot") == [digest_of(content)]
    assert {version.digest for version in site.state("default/bot").versions} == {digest_of("v1"), digest_of("v2")}
    assert site.validator.calls == 2


async def test_what_an_operator_promotes_stays_until_the_content_changes(tmp_path: Path, lines: Lines) -> None:
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        await site.scan()
        site.put("default/bot", "v2")
        await site.scan()
        await site.move("default/bot", "v1")
        site.put("default/bot", "v2")  # other files, the same bytes
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")]
    async with following(tmp_path) as site:
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")]
        assert lines("stays where an operator put it")
        site.put("default/bot", "v3")
        await site.scan()
        assert site.served("default/bot") == [digest_of("v3")]


async def test_a_change_while_the_server_is_down_is_a_change(tmp_path: Path) -> None:
    async with following(tmp_path) as site:
        for content in ("v1", "v2"):
            site.put("default/bot", content)
            await site.scan()
    site.put("default/bot", "v1")
    async with following(tmp_path) as site:
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")] and site.validator.calls == 0


async def test_a_change_that_makes_no_other_version_moves_no_traffic(site: Site, lines: Lines) -> None:
    site.put("default/bot", "v1")
    await site.scan()
    site.put("default/bot", "v2")
    await site.scan()
    await site.move("default/bot", "v1")
    site.put("default/bot", "v2", config=CONFIG.replace(b"{", b'{"lora_dropout": 0.5, ', 1))
    await site.scan()
    assert site.served("default/bot") == [digest_of("v1")]
    assert len(site.state("default/bot").versions) == 2 and lines("makes no difference")


@pytest.mark.parametrize("lost", ["missing", "broken"])
async def test_without_a_record_an_adapter_keeps_its_traffic(tmp_path: Path, lines: Lines, lost: str) -> None:
    """As after a restored backup: a rollback must not be undone."""
    async with following(tmp_path) as site:
        for content in ("v1", "v2"):
            site.put("default/bot", content)
            await site.scan()
        await site.move("default/bot", "v1")
    record = tmp_path / "store" / "directory.json"
    record.unlink() if lost == "missing" else record.write_text("{")
    async with following(tmp_path) as site:
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")]
        assert len(lines("stays where an operator put it")) == 1
        assert len(lines("directory.json cannot be read")) == (lost == "broken")


async def test_deletions_by_rpc_stay_and_other_content_brings_the_adapter_back(tmp_path: Path, lines: Lines) -> None:
    bot = AdapterReference(tenant="default", adapter="bot")
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        await site.scan()
        await site.cycle.delete_adapter("default", bot)
        await site.scan()
        assert ("default", "bot") not in site.cycle.table.adapters
    async with following(tmp_path) as site:
        await site.scan()
        assert ("default", "bot") not in site.cycle.table.adapters
        assert len(lines("has been deleted since")) == 1
        site.put("default/bot", "v2")
        await site.scan()
        assert site.served("default/bot") == [digest_of("v2")]


async def test_a_directory_that_goes_deletes_nothing_and_is_said_once(site: Site, lines: Lines) -> None:
    bot = site.put("default/bot", "v1")
    await site.scan()
    bot.rename(site.root / ".aside")
    await site.scan()
    await site.scan()
    assert len(lines("default/bot is gone")) == 1 and site.served("default/bot") == [digest_of("v1")]
    revision = site.cycle.revision
    (site.root / ".aside").rename(bot)
    await site.scan()
    assert site.cycle.revision == revision


async def test_a_bad_adapter_is_said_once_and_the_others_are_taken(site: Site, lines: Lines) -> None:
    site.put("default/a-no-json", "x", config=b"{")
    (site.put("default/b-no-tensors", "x") / TENSORS).unlink()
    site.put("default/c-large", "x" * 10_001)
    site.put("default/d-large-config", "x", config=b" " * 70_000)
    site.put("default/z-good", "good")
    for _ in range(3):
        await site.scan()
    assert site.served("default/z-good") == [digest_of("good")] and len(site.cycle.table.adapters) == 1
    for name, words in (
        ("a-no-json", "adapter_config.json"),
        ("b-no-tensors", f"{TENSORS} is missing"),
        ("c-large", "the limit is 10000"),
        ("d-large-config", "the limit is"),
    ):
        (line,) = lines(f"default/{name} is refused")
        assert words in line
    assert not lines("broke") and not list((site.root.parent / "store" / ".uploads").iterdir())


async def test_a_refusal_of_the_worker_lasts_until_the_content_changes(site: Site, lines: Lines) -> None:
    site.validator.error = FailedPrecondition(Reason.ADAPTER_NUMERICS, "holds NaN")
    site.put("default/bot", "bad")
    await site.scan()
    site.validator.error = None
    await site.scan()
    assert site.validator.calls == 1 and ("default", "bot") not in site.cycle.table.adapters
    assert len(lines("is refused until it changes: ADAPTER_NUMERICS: holds NaN")) == 1
    site.put("default/bot", "better")
    await site.scan()
    assert site.served("default/bot") == [digest_of("better")]


async def test_what_may_pass_is_tried_again_later_and_said_once(
    site: Site, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    site.validator.error = Unavailable(Reason.STORE_UNAVAILABLE, "away")
    site.put("default/bot", "v1")
    await site.scan()
    await site.scan()
    assert site.validator.calls == 1
    now[0] += 61.0  # the longest delay
    await site.scan()
    assert site.validator.calls == 2 and len(lines("tried again")) == 1
    site.validator.error = None
    now[0] += 61.0
    await site.scan()
    assert site.served("default/bot") == [digest_of("v1")]


async def test_a_version_that_does_not_fit_leaves_the_traffic_and_is_promoted_once_it_does(
    tmp_path: Path, lines: Lines
) -> None:
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        await site.scan()
        site.put("default/bot", "v2")
        site.engine.error = ResourceExhausted(Reason.ADAPTER_SLOTS_EXHAUSTED, "all slots are pinned")
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")] and len(site.state("default/bot").versions) == 2
        assert len(lines("ADAPTER_SLOTS_EXHAUSTED")) == 1
    async with following(tmp_path) as site:  # a restart in between
        await site.scan()
        assert site.served("default/bot") == [digest_of("v2")]


async def test_a_restart_between_commit_and_promote_goes_on_where_it_was(tmp_path: Path) -> None:
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        await site.scan()
    (tmp_path / "store" / "directory.json").unlink()  # v1 might as well have come by RPC
    async with following(tmp_path) as site:
        site.put("default/bot", "v2")
        site.engine.error = ResourceExhausted(Reason.ADAPTER_SLOTS_EXHAUSTED, "all slots are pinned")
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")] and len(site.state("default/bot").versions) == 2
    async with following(tmp_path) as site:
        await site.scan()
        assert site.served("default/bot") == [digest_of("v2")]


async def test_what_is_too_large_is_not_even_read(site: Site, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterDirectory, "record", lambda *_: pytest.fail("it is read"))
    site.put("default/bot", "x" * 10_001)
    await site.scan()
    assert len(lines("makes 10")) == 1


async def test_two_servers_follow_one_directory(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "two" / "adapters").symlink_to(tmp_path / "one" / "adapters")
    (tmp_path / "one" / "adapters").mkdir()
    async with following(tmp_path / "one") as one, following(tmp_path / "two") as two:
        one.put("default/bot", "v1")
        await asyncio.gather(one.scan(), two.scan())
        one.put("default/bot", "v2")
        await two.scan()
        assert one.served("default/bot") == [digest_of("v1")] and two.served("default/bot") == [digest_of("v2")]
        await one.scan()
        assert one.served("default/bot") == [digest_of("v2")]


async def test_tenants_that_are_not_served_are_named_once(site: Site, lines: Lines) -> None:
    site.put("other/bot", "v1")
    site.put("other/bot2", "v1")
    site.put("default/bot", "v1")
    await site.scan()
    await site.scan()
    assert len(lines("'other' is left alone: this server has no such tenant")) == 1 and not lines("other/")
    assert list(site.cycle.table.adapters) == [("default", "bot")]


async def test_what_has_just_been_modified_rests_for_a_poll_first(site: Site, lines: Lines) -> None:
    site.age = 0.0
    bot = site.put("default/bot", "v1")
    await site.scan()
    assert not site.cycle.table.adapters and len(lines("just been modified")) == 1
    (bot / TENSORS).write_text("v1 goes on")
    await site.scan()
    assert not site.cycle.table.adapters and len(lines("just been modified")) == 1
    await site.scan()
    assert site.served("default/bot") == [digest_of("v1 goes on")]


async def test_a_root_that_cannot_be_read_for_a_while(site: Site, lines: Lines) -> None:
    site.put("default/bot", "v1")
    await site.scan()
    site.root.rename(site.root.with_name("away"))
    await site.scan()
    await site.scan()
    assert len(lines("all of it is left alone: it cannot be read (No such file or directory)")) == 1
    assert not lines("is gone")
    site.root.with_name("away").rename(site.root)
    site.put("default/bot", "v2")
    await site.scan()
    assert site.served("default/bot") == [digest_of("v2")] and lines("looked at again")


async def test_the_first_scan_is_announced_when_all_is_served_or_said(tmp_path: Path, lines: Lines) -> None:
    async with following(tmp_path) as site:
        site.put("default/bad", "x", config=b"{")
        site.put("default/good", "x")
        site.validator.gate = asyncio.Event()
        site.source.begin()
        site.source.begin()
        async with asyncio.timeout(10):
            await until(lambda: site.validator.calls > 0)
        assert not site.source.first_scan_over and lines("default/bad is refused")
        site.validator.gate.set()
        async with asyncio.timeout(10):
            await site.announced.wait()
        assert site.source.first_scan_over and site.served("default/good") == [digest_of("x")]


async def test_fresh_directories_are_waited_for_and_later_ones_are_followed(tmp_path: Path) -> None:
    async with following(tmp_path, poll=0.05) as site:
        site.age = 0.0
        site.put("default/bot", "v1")
        site.source.begin()
        async with asyncio.timeout(10):
            await site.announced.wait()
            assert site.served("default/bot") == [digest_of("v1")]
            site.put("default/bot", "v2")
            await until(lambda: site.served("default/bot") == [digest_of("v2")])


async def test_the_wait_for_the_first_scan_is_bounded_and_the_scan_goes_on(tmp_path: Path, lines: Lines) -> None:
    async with following(tmp_path, patience=0.05) as site:
        site.put("default/bot", "v1")
        site.validator.gate = asyncio.Event()
        site.source.begin()
        async with asyncio.timeout(10):
            await site.announced.wait()
            assert not site.cycle.table.adapters and len(lines("takes longer than 0.05 s")) == 1
            site.validator.gate.set()
            await until(lambda: bool(site.cycle.table.adapters) and bool(site.served("default/bot")))


async def test_it_ends_in_the_middle_of_a_scan(tmp_path: Path, lines: Lines) -> None:
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        site.validator.gate = asyncio.Event()
        site.source.begin()
        async with asyncio.timeout(10):
            await until(lambda: site.validator.calls > 0)
            await site.source.close()
            await site.source.close()
        assert not site.announced.is_set()
    assert not lines("broke") and not lines("cannot be taken")
    async with following(tmp_path) as site:
        await site.scan()
        assert site.served("default/bot") == [digest_of("v1")]


async def test_a_bug_does_not_keep_the_server_from_getting_ready(tmp_path: Path, lines: Lines) -> None:
    async with following(tmp_path) as site:
        site.put("default/bot", "v1")
        site.validator.error = ZeroDivisionError()  # type: ignore[assignment]
        site.source.begin()
        async with asyncio.timeout(10):
            await site.announced.wait()
            await until(lambda: bool(lines("following the adapters directory broke")))


async def test_a_directory_that_is_not_there_is_an_error_at_start(site: Site) -> None:
    shutil.rmtree(site.root)
    with pytest.raises(FileNotFoundError):
        await site.source.open()
