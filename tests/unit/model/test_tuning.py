"""Measured choices of the product's backend: from timings to a table, to a file, and back."""

import logging
from pathlib import Path

import pytest
import torch

from loramux_base.checkpoint import read_json
from loramux_server.model import tuning
from loramux_server.model.linear import Backend, TuningRow
from loramux_server.model.spec import ModelSpec
from loramux_server.model.tuning import (
    Measured,
    TuningFile,
    TuningFileError,
    choices,
    find_tuning,
    measure,
    product_shapes,
    read_tuning,
    tuning_path,
)
from loramux_server.tune_command import report
from tests.support.tiny_models import make_checkpoint

CUDA = torch.device("cuda")
SHAPES = [(96, 64), (128, 64)]
BACKENDS: list[Backend] = ["dequantize", "bitsandbytes"]


def timer(backend: Backend, n: int, k: int, m: int) -> float:
    """The fused product is faster up to 16 rows for the first shape, never for the second."""
    if backend == "dequantize":
        return 10e-6
    return (9e-6 if m <= 16 else 20e-6) if n == 96 else 30e-6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "bitsandbytes_available", lambda: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_fastest_backend_holds_up_to_the_next_measured_row_count() -> None:
    rows = choices(measure(SHAPES, timer, rows=(1, 16, 17, 256), backends=BACKENDS))
    assert rows == [
        TuningRow(n=96, k=64, max_m=16, backend="bitsandbytes"),
        TuningRow(n=96, k=64, max_m=2**31 - 1, backend="dequantize"),
        TuningRow(n=128, k=64, max_m=2**31 - 1, backend="dequantize"),
    ]


def test_a_table_survives_the_file_and_decides(cache: Path) -> None:
    rows = choices(measure(SHAPES, timer, rows=(1, 16, 17), backends=BACKENDS))
    TuningFile.of("Card 80GB", rows).save(tuning_path("Card 80GB"))
    table = find_tuning("Card 80GB")
    assert table is not None
    assert [table.choose(96, 64, m, CUDA) for m in (1, 16, 17, 100_000)] == ["bitsandbytes"] * 2 + ["dequantize"] * 2
    assert list(cache.rglob("*.json")) == [cache / "loramux/tuning/Card-80GB.json"]
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".json"]


def test_a_backend_that_is_gone_is_left_to_the_heuristic(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = choices(measure(SHAPES, timer, rows=(1, 16, 17), backends=BACKENDS))
    TuningFile.of("c", rows).save(tuning_path("c"))
    monkeypatch.setattr(tuning, "bitsandbytes_available", lambda: False)
    table = find_tuning("c")
    assert table is not None
    assert [table.choose(96, 64, m, CUDA) for m in (1, 17)] == ["dequantize"] * 2
    assert "not here" in caplog.text


def test_a_card_without_a_table_is_told_once_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=tuning.__name__):
        assert find_tuning("Other") is None
    assert "loramux-server tune" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 1}',
        '{"version": 2, "card": "c", "torch": "t", "rows": []}',
        '{"version": 1, "card": "c", "torch": "t", "rows": [{"n": 1, "k": 1, "max_m": 1, "backend": "magic"}]}',
    ],
)
def test_a_damaged_table_is_named(text: str) -> None:
    path = tuning_path("c")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(TuningFileError, match=r"c\.json: .*loramux-server tune"):
        find_tuning("c")


def test_a_names_signs_do_not_leave_the_folder(cache: Path) -> None:
    assert tuning_path("../../x y/z").parent == cache / "loramux/tuning"


def test_all_products_of_a_layer_are_measured(tmp_path: Path) -> None:
    spec = ModelSpec.from_config(read_json(make_checkpoint(tmp_path / "m") / "config.json"))
    inner, outer = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    assert set(product_shapes(spec)) == {
        (inner + 2 * outer, spec.hidden_size),
        (spec.hidden_size, inner),
        (2 * spec.intermediate_size, spec.hidden_size),
        (spec.hidden_size, spec.intermediate_size),
    }


def test_the_report_shows_every_backend_and_the_choice() -> None:
    text = report([Measured(n=96, k=64, m=8, seconds={"dequantize": 10e-6, "bitsandbytes": 9e-6})])
    assert "dequantize     10.0 us" in text and text.endswith("-> bitsandbytes")


def test_a_table_that_was_read_is_what_was_written() -> None:
    file = TuningFile.of("c", choices(measure(SHAPES, timer, backends=BACKENDS)))
    file.save(tuning_path("c"))
    assert read_tuning(tuning_path("c")) == file
