"""The loader's threads: what reads or loads never holds up the one that asks."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from loramux_base.adapter import AdapterFormatError, AdapterLayout, base_shapes, read_layout
from loramux_base.checkpoint import read_json
from loramux_server.engine import adapter_fetcher, adapter_loader
from loramux_server.engine.adapter_loader import AdapterLoader, _refusal
from loramux_server.errors import FailedPrecondition, Reason, Unavailable
from loramux_server.model.adapter_read import read_rows
from loramux_server.model.serving_blob import BLOB_NAME
from loramux_server.model.slab import LoraSlab
from tests.support.tiny_models import make_adapter, make_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("loader")
    base = make_checkpoint(root / "base", "llama", hidden=64, layers=2)
    return base, make_adapter(root / "adapter", base, rank=20, alpha=8, seed=1, target_modules=["q_proj"])


def make_loader(base: Path, **options: object) -> tuple[AdapterLoader, LoraSlab]:
    shapes = base_shapes(read_json(base / "config.json"))
    slab = LoraSlab(shapes, rank_units=4, max_slots=2, max_rank=32, dtype=torch.float32, device="cpu", poison=True)
    device = torch.device("cpu")
    loader = AdapterLoader(slab, shapes, rank_units=4, max_slots=2, max_rank=32, device=device, **options)  # type: ignore[arg-type]
    return loader, slab


@pytest.fixture
def loader(files: tuple[Path, Path]) -> Iterator[AdapterLoader]:
    made, _ = make_loader(files[0])
    yield made
    made.close()


@pytest.fixture
def warm(files: tuple[Path, Path]) -> Iterator[tuple[AdapterLoader, LoraSlab]]:
    """A loader with host memory, and its slab."""
    made = make_loader(files[0], host_bytes=1 << 20)
    yield made
    made[0].wait_idle()
    made[0].check_integrity()
    made[0].close()


def ended(loader: AdapterLoader) -> list[tuple[int, Exception | None]]:
    return eventually(lambda: loader.poll_loads() or None)


def rows_of(slab: LoraSlab) -> list[torch.Tensor]:
    """Everything in the slab, NaN included, as bytes."""
    groups = [slab.group(layer, name) for layer in range(2) for name in ("qkv", "o", "gate_up", "down")]
    tensors = [tensor for g in groups for tensor in (g.a, g.b, g.ranks, g.scales, g.first_rows)]
    return [tensor.contiguous().clone().view(torch.uint8) for tensor in tensors]


T = TypeVar("T")


def eventually(ask: Callable[[], T | None]) -> T:
    until = time.monotonic() + 20
    while (answer := ask()) is None:
        assert time.monotonic() < until, "never answered"
        time.sleep(0.001)
    return answer


def test_asking_does_not_wait_for_the_reading(
    loader: AdapterLoader, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    threads: list[str] = []

    def slow(*arguments: object, **options: object) -> AdapterLayout:
        threads.append(threading.current_thread().name)
        assert go.wait(20)
        return read_layout(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_loader, "read_layout", slow)
    path = str(files[1])
    assert [loader.units_of(path) for _ in range(3)] == [None] * 3
    # A load goes on beside it.
    loader.start_load(0, 0, 2, path)
    until = time.monotonic() + 20
    while not (ended := loader.poll_loads()):
        assert time.monotonic() < until
        time.sleep(0.001)
    assert ended == [(0, None)]
    assert loader.units_of(path) is None
    go.set()
    assert eventually(lambda: loader.units_of(path)) == 2
    assert loader.units_of(path) == 2 and len(threads) == 1, "read once"
    assert threads[0] != threading.current_thread().name


def test_a_refusal_is_told_and_the_files_are_read_again(loader: AdapterLoader, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.mkdir()
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            eventually(lambda: loader.units_of(str(path)))
        assert caught.value.reason is Reason.ADAPTER_INCOMPATIBLE


def test_an_unreadable_store_is_worth_a_retry_and_names_no_path(
    loader: AdapterLoader, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> AdapterLayout:
        raise OSError(5, "Input/output error", str(files[1]))

    monkeypatch.setattr(adapter_loader, "read_layout", broken)
    with pytest.raises(Unavailable) as caught:
        eventually(lambda: loader.units_of(str(files[1])))
    assert caught.value.reason is Reason.STORE_UNAVAILABLE and caught.value.retry_after == 1.0
    assert str(files[1]) not in caught.value.message
    monkeypatch.undo()
    assert eventually(lambda: loader.units_of(str(files[1]))) == 2


def test_the_sizes_that_are_kept_are_bounded(
    loader: AdapterLoader, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_loader, "_MAX_KNOWN_SIZES", 2)
    reads: list[object] = []

    def counted(*arguments: object, **options: object) -> AdapterLayout:
        reads.append(arguments[0])
        return read_layout(files[1], *arguments[1:], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_loader, "read_layout", counted)
    for name in ("a", "b", "c", "c", "a"):
        assert eventually(lambda name=name: loader.units_of(name)) == 2  # type: ignore[misc]
    assert reads == [Path(name) for name in ("a", "b", "c", "a")]


def test_a_store_that_is_away_is_no_fault_of_the_adapter(tmp_path: Path) -> None:
    error = AdapterFormatError("ADAPTER_INCOMPATIBLE", "adapter", "the adapter is not a directory")
    assert _refusal(error, str(tmp_path / "away")).reason is Reason.STORE_UNAVAILABLE
    assert _refusal(error, str(tmp_path)).reason is Reason.ADAPTER_INCOMPATIBLE


def test_a_load_from_the_host_gives_the_rows_of_one_from_the_store(
    warm: tuple[AdapterLoader, LoraSlab], files: tuple[Path, Path]
) -> None:
    loader, slab = warm
    path = str(files[1])
    loader.start_load(1, 1, 2, path)
    assert ended(loader) == [(1, None)]
    cold = rows_of(slab)
    loader.clear(1)
    loader.prefetch(path)
    loader.start_load(1, 1, 2, path)
    assert ended(loader) == [(1, None)]
    assert all(map(torch.equal, rows_of(slab), cold)), "bit for bit"
    assert (loader.host_use().hits, loader.host_use().misses) == (1, 1)
    assert loader.host_use().bytes_used > 0 and loader.host_use().bytes_total == 1 << 20


def test_a_hint_brings_size_and_rows(
    warm: tuple[AdapterLoader, LoraSlab], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, _ = warm
    path = str(files[1])
    assert not loader.in_host(path) and loader.poll_host() == []
    loader.prefetch(path)
    loader.wait_idle()
    assert loader.in_host(path) and loader.poll_host() == [path]

    def away(*_: object, **__: object) -> None:
        raise AssertionError("the store is asked again")

    monkeypatch.setattr(adapter_fetcher, "read_layout", away)
    monkeypatch.setattr(adapter_loader, "read_layout", away)
    assert loader.units_of(path) == 2
    loader.start_load(0, 0, 2, path)
    assert ended(loader) == [(0, None)]
    use = loader.host_use()
    assert (use.hits, use.misses, use.prefetches) == (1, 0, 1)
    loader.forget(path)
    assert not loader.in_host(path) and loader.host_use().bytes_used == 0 and loader.poll_host() == [path]


def test_what_is_on_the_host_waits_for_no_store(
    warm: tuple[AdapterLoader, LoraSlab], files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, _ = warm
    path = str(files[1])
    loader.prefetch(path)
    loader.wait_idle()
    go = threading.Event()

    def slow(*arguments: object) -> None:
        assert go.wait(20)
        read_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_fetcher, "read_rows", slow)
    other = make_adapter(tmp_path / "other", files[0], rank=4, seed=2, target_modules=["q_proj"])
    loader.start_load(0, 0, 1, str(other))
    loader.start_load(1, 1, 2, path)
    assert ended(loader) == [(1, None)]
    go.set()
    assert ended(loader) == [(0, None)]


class TestFaults:
    """Each stage fails its load alone; the next one goes well."""

    def load(self, loader: AdapterLoader, path: Path, slot: int = 0) -> Exception | None:
        loader.start_load(slot, 2 * slot, 2, str(path))
        [(where, error)] = ended(loader)
        assert where == slot
        return error

    def test_of_reading(
        self, warm: tuple[AdapterLoader, LoraSlab], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader, slab = warm
        faults: list[tuple[Exception, type[Exception], Reason | None]] = [
            (OSError(5, "Input/output error"), Unavailable, Reason.STORE_UNAVAILABLE),
            (AdapterFormatError("ADAPTER_NUMERICS", "t", "too large"), FailedPrecondition, Reason.ADAPTER_NUMERICS),
            (RuntimeError("no memory"), RuntimeError, None),
        ]
        for stage in ("read_layout", "read_rows"):
            for fault, kind, reason in faults:

                def fail(*_: object, fault: Exception = fault, **__: object) -> None:
                    raise fault

                with monkeypatch.context() as patched:
                    patched.setattr(adapter_fetcher, stage, fail)
                    error = self.load(loader, files[1])
                assert isinstance(error, kind) and getattr(error, "reason", None) is reason
                assert slab.resident_slots == frozenset() and loader.host_use().bytes_used == 0
        assert self.load(loader, files[1]) is None

    def test_of_the_copy(
        self, warm: tuple[AdapterLoader, LoraSlab], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader, slab = warm
        assert self.load(loader, files[1], 1) is None

        def half(*_: object) -> None:
            slab.group(0, "qkv").ranks[0] = 20
            raise RuntimeError("the device failed")

        with monkeypatch.context() as patched:
            patched.setattr(slab, "_fill_rest", half)
            error = self.load(loader, files[1])
        assert isinstance(error, RuntimeError)
        assert slab.resident_slots == {1} and not slab.group(0, "qkv").ranks[0].any()
        loader.clear(0)
        assert self.load(loader, files[1]) is None
        assert slab.resident_slots == {0, 1} and loader.host_use().misses == 1

    def test_of_too_few_units(self, warm: tuple[AdapterLoader, LoraSlab], files: tuple[Path, Path]) -> None:
        loader, slab = warm
        loader.start_load(0, 0, 1, str(files[1]))
        [(_, error)] = ended(loader)
        assert isinstance(error, FailedPrecondition) and error.reason is Reason.ADAPTER_INCOMPATIBLE
        assert slab.resident_slots == frozenset()

    def test_of_the_store(self, warm: tuple[AdapterLoader, LoraSlab], tmp_path: Path) -> None:
        error = self.load(warm[0], tmp_path / "away")
        assert isinstance(error, Unavailable) and error.reason is Reason.STORE_UNAVAILABLE
        assert str(tmp_path) not in error.message


def test_blobs_are_written_where_it_is_told(files: tuple[Path, Path], tmp_path: Path) -> None:
    base = files[0]
    adapter = make_adapter(tmp_path / "mine", base, rank=4, seed=3, target_modules=["q_proj"])
    slabs = []
    for told in (False, True, True):
        loader, slab = make_loader(base, host_bytes=1 << 20, serving_blobs=told)
        loader.start_load(0, 0, 1, str(adapter))
        assert ended(loader) == [(0, None)]
        loader.wait_idle()
        assert (adapter / BLOB_NAME).exists() == told
        slabs.append(rows_of(slab))
        loader.close()
    assert all(map(torch.equal, slabs[0], slabs[2])), "from the blob, bit for bit"


def test_closing_waits_for_the_load_that_runs(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loader, slab = make_loader(files[0], host_bytes=1 << 20)
    reading, go = threading.Event(), threading.Event()

    def slow(*arguments: object) -> None:
        reading.set()
        assert go.wait(20)
        read_rows(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_fetcher, "read_rows", slow)
    loader.start_load(0, 0, 2, str(files[1]))
    loader.start_load(1, 2, 2, str(files[1].parent / "never"))
    assert reading.wait(20)
    threading.Timer(0.05, go.set).start()
    loader.close()
    assert slab.resident_slots in (frozenset(), {0})
    slab.check_integrity()
