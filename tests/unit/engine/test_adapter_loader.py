"""The loader's threads: what reads or loads never holds up the one that asks."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loramux_base.adapter import AdapterFormatError, AdapterLayout, base_shapes, read_layout
from loramux_base.checkpoint import read_json
from loramux_server.engine import adapter_loader
from loramux_server.engine.adapter_loader import AdapterLoader, _refusal
from loramux_server.errors import FailedPrecondition, Reason, Unavailable
from loramux_server.model.slab import LoraSlab
from tests.support.tiny_models import make_adapter, make_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("loader")
    base = make_checkpoint(root / "base", "llama", hidden=64, layers=2)
    return base, make_adapter(root / "adapter", base, rank=20, alpha=8, seed=1, target_modules=["q_proj"])


@pytest.fixture
def loader(files: tuple[Path, Path]) -> Iterator[AdapterLoader]:
    shapes = base_shapes(read_json(files[0] / "config.json"))
    slab = LoraSlab(shapes, rank_units=4, max_slots=2, max_rank=32, dtype=torch.float32, device="cpu")
    made = AdapterLoader(slab, shapes, rank_units=4, max_slots=2, max_rank=32, device=torch.device("cpu"))
    yield made
    made.close()


def eventually(ask: Callable[[], int | None]) -> int:
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
