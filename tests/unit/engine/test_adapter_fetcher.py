"""From the store to the host: once, for loads before hints, from the blob where there is one."""

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from loramux_base.adapter import TENSORS_NAME, AdapterFormatError, AdapterLayout
from loramux_server.engine import adapter_fetcher, blob_writer
from loramux_server.engine.adapter_fetcher import HINT_SECONDS, RETRY_SECONDS, AdapterFetcher
from loramux_server.engine.host_arena import HostArena, Lease
from loramux_server.model.adapter_read import read_rows
from loramux_server.model.adapter_rows import RowsLayout
from loramux_server.model.serving_blob import BLOB_NAME, PARTIAL_NAME
from tests.support.adapters import tensors_of, tiny_base, write_adapter

BASE = tiny_base()
DTYPE = torch.float32
ROWS = RowsLayout(BASE, dtype=DTYPE, rows=4, groups=["qkv", "o"])
SIZE = -(-ROWS.nbytes // 64) * 64


class Reads:
    """What is read from PEFT files, in order; `gate` holds reading up, `error` makes it fail."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.threads: list[str] = []
        self.gate: threading.Event | None = None
        self.began = threading.Semaphore(0)
        self.error: Exception | None = None

    def __call__(self, directory: Path, adapter: AdapterLayout, layout: RowsLayout, memory: torch.Tensor) -> None:
        self.names.append(directory.name)
        self.threads.append(threading.current_thread().name)
        self.began.release()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.error is not None:
            raise self.error
        read_rows(directory, adapter, layout, memory)

    def wait(self) -> None:
        assert self.began.acquire(timeout=20)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    made = Reads()
    monkeypatch.setattr(adapter_fetcher, "read_rows", made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for index, name in enumerate("abcdef"):
        tensors = tensors_of(BASE, modules=["q_proj", "o_proj"], value=float(index + 1))
        write_adapter(tmp_path / "store" / name, tensors)
    return tmp_path / "store"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Host:
    """A fetcher over an arena for `room` adapters."""

    def __init__(self, store: Path, *, room: float = 8, hints: int = 8, blobs: bool = False) -> None:
        self.store = store
        self.clock = Clock()
        self.arena = HostArena(int(room * SIZE), device=torch.device("cpu"))
        self.fetcher = AdapterFetcher(
            self.arena, BASE, dtype=DTYPE, max_rank=16, max_hints=hints, blobs=blobs, clock=self.clock
        )

    def path(self, name: str) -> str:
        return str(self.store / name)

    def fetch(self, name: str) -> "Future[Lease]":
        return self.fetcher.fetch(self.path(name))

    def value(self, name: str) -> float:
        """Fetch, and the number that the adapter is made of."""
        lease = self.fetch(name).result(20)
        views = lease.rows.layout.views(lease.rows.memory)
        value = views["o"].a.unique().item()
        assert views["qkv"].a[:, 0].unique().tolist() == [value] and not views["qkv"].a[:, 1:].any()
        assert lease.rows.ranks() == {(layer, name): 4 for layer in range(3) for name in ("q_proj", "o_proj")}
        lease.release()
        return float(value)

    def hint(self, *names: str) -> None:
        for name in names:
            self.fetcher.prefetch(self.path(name))

    def holds(self) -> str:
        return "".join(name for name in "abcdef" if self.path(name) in self.arena)

    def counts(self) -> tuple[int, int, int]:
        return self.fetcher.hits, self.fetcher.misses, self.fetcher.prefetches

    def settle(self) -> None:
        self.fetcher.wait_idle(20)
        self.arena.check_integrity()


@contextlib.contextmanager
def hosting(store: Path, **options: float) -> Iterator[Host]:
    host = Host(store, **options)  # type: ignore[arg-type]
    try:
        yield host
        host.settle()
    finally:
        host.fetcher.close()
        host.arena.check_integrity()


def test_rows_are_read_once_and_kept(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        assert [host.value(name) for name in "abab"] == [1, 2, 1, 2]
        assert reads.names == ["a", "b"] and host.counts() == (2, 2, 0)


def test_what_was_hinted_is_not_read_again(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        host.hint("a", "b", "a")
        host.settle()
        assert host.holds() == "ab" and reads.threads == ["adapter-prefetcher_0"] * 2
        assert host.value("b") == 2
        assert reads.names == ["a", "b"] and host.counts() == (1, 0, 2)


def test_a_load_joins_the_hint_that_is_being_read(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        reads.gate = threading.Event()
        host.hint("a")
        reads.wait()
        both = [host.fetch("a") for _ in range(2)]
        assert not any(future.done() for future in both)
        reads.gate.set()
        first, second = (future.result(20) for future in both)
        assert first.rows.memory.data_ptr() == second.rows.memory.data_ptr()
        first.release()
        second.release()
        assert reads.names == ["a"] and host.counts() == (0, 2, 0)


def test_a_load_overtakes_hints(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        reads.gate = threading.Event()
        host.hint("a", "b", "c")
        reads.wait()
        wanted = host.fetch("c")
        reads.wait()
        assert reads.names == ["a", "c"] and reads.threads[1] == "adapter-fetcher_0"
        reads.gate.set()
        wanted.result(20).release()
        host.settle()
        assert reads.names.count("c") == 1 and host.holds() == "abc"


def test_hints_are_bounded_and_end(store: Path, reads: Reads) -> None:
    with hosting(store, hints=2) as host:
        host.hint("a", "b", "c")
        host.settle()
        assert host.holds() == "ab"
        host.value("a")
        host.hint("c", "d")
        host.settle()
        assert host.holds() == "abc", "a load makes room for one more hint"
        host.clock.now += HINT_SECONDS
        host.hint("d")
        host.settle()
        assert host.holds() == "abcd"


def test_hints_do_not_throw_out_what_was_hinted_before(store: Path, reads: Reads) -> None:
    with hosting(store, room=2) as host:
        host.value("f")
        host.hint("a", "b", "c")
        host.settle()
        assert host.holds() == "ab" and host.counts()[2] == 2
        host.value("a")
        host.hint("c")
        host.settle()
        assert host.holds() == "ab", "not read at once again"
        host.clock.now += RETRY_SECONDS
        host.hint("c")
        host.settle()
        assert host.holds() == "bc"
        host.clock.now += HINT_SECONDS
        host.hint("d")
        host.settle()
        assert host.holds() == "cd", "a hint that nobody follows does not hold its room for ever"


def test_a_load_takes_the_room_of_hints(store: Path, reads: Reads) -> None:
    with hosting(store, room=2) as host:
        host.hint("a", "b")
        host.settle()
        assert host.value("c") == 3 and "c" in host.holds()


def test_without_room_a_load_has_memory_of_its_own(store: Path, reads: Reads) -> None:
    with hosting(store, room=0.5) as host:
        assert [host.value(name) for name in "aba"] == [1, 2, 1]
        assert host.holds() == "" and host.arena.used == 0 and reads.names == ["a", "b", "a"]
        host.hint("c")
        host.settle()
        assert reads.names == ["a", "b", "a"]
    with hosting(store, room=1) as host:
        held = host.fetch("a").result(20)
        assert host.value("b") == 2 and host.holds() == "a"
        held.release()
        assert host.value("b") == 2 and host.holds() == "b"


def test_a_hint_without_room_that_a_load_joins_meanwhile_is_read(
    store: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosting(store, room=1) as host:
        host.hint("a")
        host.settle()
        room = host.fetcher._room

        def slow(path: str, nbytes: int, *, ahead: bool) -> Lease:
            try:
                return room(path, nbytes, ahead=ahead)
            except adapter_fetcher._NoRoom:
                loads.append(host.fetch("b"))
                raise

        loads: list[Future[Lease]] = []
        monkeypatch.setattr(host.fetcher, "_room", slow)
        host.hint("b")
        host.settle()
        assert len(loads) == 1
        loads[0].result(20).release()
        assert reads.names == ["a", "b"]


def test_a_failed_read_fails_its_loads_only(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        reads.error = OSError(5, "Input/output error")
        with pytest.raises(OSError, match="Input/output"):
            host.fetch("a").result(20)
        reads.error = None
        assert host.arena.used == 0 and host.value("a") == 1
        shutil.rmtree(store / "b")
        with pytest.raises(AdapterFormatError):
            host.fetch("b").result(20)
        (store / "c" / TENSORS_NAME).write_bytes(b"nothing")
        host.hint("c")
        host.settle()
        with pytest.raises(AdapterFormatError):
            host.fetch("c").result(20)
        assert host.value("d") == 4


def test_forgetting_frees(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        host.value("a")
        host.fetcher.forget(host.path("a"))
        assert host.holds() == "" and host.arena.used == 0
        assert host.value("a") == 1 and reads.names == ["a", "a"]
        reads.gate = threading.Event()
        wanted = host.fetch("b")
        reads.wait(), reads.wait(), reads.wait()
        host.fetcher.forget(host.path("b"))
        reads.gate.set()
        lease = wanted.result(20)
        assert host.holds() == "a" and lease.rows.layout.rows == 4
        lease.release()
        host.settle()
        assert host.arena.used == SIZE


def test_forgotten_hints_are_not_read(store: Path, reads: Reads) -> None:
    with hosting(store) as host:
        reads.gate = threading.Event()
        host.hint("a", "b")
        reads.wait()
        host.fetcher.forget(host.path("a"))
        host.fetcher.forget(host.path("b"))
        host.hint("c")
        reads.gate.set()
        host.settle()
        assert reads.names == ["a", "c"] and host.holds() == "c" and host.arena.used == SIZE


def test_closing_cancels_what_waits(store: Path, reads: Reads) -> None:
    host = Host(store)
    reads.gate = threading.Event()
    running, waiting = host.fetch("a"), host.fetch("b")
    reads.wait()
    host.hint("c")
    reads.wait()
    threading.Timer(0.05, reads.gate.set).start()
    host.fetcher.close()
    assert running.result(0).rows.layout.rows == 4
    assert waiting.cancelled()


class TestBlobs:
    def test_the_second_process_reads_the_blob(self, store: Path, reads: Reads) -> None:
        with hosting(store, blobs=True) as host:
            assert host.value("a") == 1
            host.settle()
            assert (store / "a" / BLOB_NAME).exists() and not (store / "a" / PARTIAL_NAME).exists()
            whole = host.fetch("a").result(20).rows.memory.clone()
        with hosting(store, blobs=True) as host:
            host.hint("a")
            host.settle()
            lease = host.fetch("a").result(20)
            assert torch.equal(lease.rows.memory, whole)
            lease.release()
            assert host.value("a") == 1
        assert reads.names == ["a"]

    def test_nothing_is_written_unless_told(self, store: Path, reads: Reads) -> None:
        with hosting(store) as host:
            host.value("a")
        assert not (store / "a" / BLOB_NAME).exists()

    def test_a_blob_that_does_not_fit_is_replaced(
        self, store: Path, reads: Reads, caplog: pytest.LogCaptureFixture
    ) -> None:
        blob = store / "a" / BLOB_NAME
        with hosting(store, blobs=True) as host:
            host.value("a")
            host.settle()
            good = blob.read_bytes()
            for damaged in (b"", good[:-1], good[:5000] + b"\x01" + good[5001:]):
                blob.chmod(0o600)
                blob.write_bytes(damaged)
                host.fetcher.forget(host.path("a"))
                assert host.value("a") == 1
                host.settle()
                assert blob.read_bytes() == good
            (store / "a" / TENSORS_NAME).write_bytes((store / "b" / TENSORS_NAME).read_bytes())
            host.fetcher.forget(host.path("a"))
            assert host.value("a") == 2
            host.settle()
            host.fetcher.forget(host.path("a"))
            assert host.value("a") == 2
        assert reads.names == ["a"] * 5
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(messages) == 4 and all(text.startswith("adapter a: serving.slab is not used") for text in messages)
        assert str(store) not in caplog.text

    def test_a_directory_that_cannot_be_written_is_no_error(
        self, store: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(blob_writer, "write_blob", refuse)
        with hosting(store, blobs=True) as host:
            for _ in range(3):
                assert host.value("a") == 1
                host.settle()
                host.fetcher.forget(host.path("a"))
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
            "adapter a: serving.slab cannot be written (Read-only file system); loads read the adapter"
        ]

    def test_complaints_are_told_once_however_many_there_are(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(blob_writer, "_MAX_COMPLAINTS", 2)
        writer = blob_writer.BlobWriter()
        for name in "aabbccc":
            writer.complain(Path("/store") / name, "no")
        writer.close()
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert told == ["adapter a: no", "adapter b: no", "adapter c: no"]

    @pytest.mark.parametrize("back", [False, True])
    def test_a_version_that_was_deleted_meanwhile_is_nobodys_fault(
        self, store: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, back: bool
    ) -> None:
        write = blob_writer.write_blob

        def late(directory: Path, *arguments: object, **options: object) -> None:
            directory.rename(store / "trash")
            try:
                write(directory, *arguments, **options)  # type: ignore[arg-type]
            finally:
                if back:
                    (store / "trash").rename(directory)

        monkeypatch.setattr(blob_writer, "write_blob", late)
        with hosting(store, blobs=True) as host:
            assert host.value("a") == 1
        assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
        assert (store / "a").exists() == back

    def test_rows_that_are_being_written_stay(self, store: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
        go, writing = threading.Event(), threading.Event()
        write = blob_writer.write_blob

        def slow(*arguments: object, **options: object) -> None:
            writing.set()
            assert go.wait(20)
            write(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(blob_writer, "write_blob", slow)
        with hosting(store, room=1, blobs=True) as host:
            assert host.value("a") == 1
            assert writing.wait(20)
            assert [host.value(name) for name in "bcdefb"] == [2, 3, 4, 5, 6, 2]
            assert host.holds() == "a"
            go.set()
        with hosting(store, blobs=True) as host:
            reads.names.clear()
            assert [host.value(name) for name in "abcd"] == [1, 2, 3, 4]
            assert reads.names == [], "as many as may wait to be written"
