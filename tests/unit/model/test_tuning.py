"""Measured choices of a card: from timings to a table, to a file, and back; files that must not be believed."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from loramux_base.checkpoint import read_json
from loramux_server import tune_command
from loramux_server.config import ConfigError
from loramux_server.engine.prefill_times import ChunkTime
from loramux_server.model import linear, tuning
from loramux_server.model.linear import Backend, TuningRow, TuningTable
from loramux_server.model.product_times import Measured, choices, measure, product_shapes
from loramux_server.model.spec import ModelSpec
from loramux_server.model.tuning import (
    TuningFile,
    TuningFileError,
    find_tuning,
    model_key,
    read_tuning,
    tuning_path,
    versions,
)
from loramux_server.tune_command import report, write
from tests.support.tiny_models import make_checkpoint

CUDA = torch.device("cuda")
SHAPES = [(96, 64), (128, 64)]
BACKENDS: list[Backend] = ["dequantize", "bitsandbytes"]
CARD = "Card 80GB"


def timer(backend: Backend, n: int, k: int, m: int) -> float:
    """The fused product is faster up to 16 rows for the first shape, never for the second."""
    if backend == "dequantize":
        return 10e-6
    return (9e-6 if m <= 16 else 20e-6) if n == 96 else 30e-6


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec.from_config(read_json(make_checkpoint(tmp_path_factory.mktemp("tuning") / "m") / "config.json"))


@pytest.fixture
def file(spec: ModelSpec) -> TuningFile:
    """A table of this model's products: the fused one up to 16 rows."""
    rows = [
        TuningRow(n=n, k=k, max_m=max_m, backend=backend)
        for n, k in product_shapes(spec)
        for max_m, backend in ((16, "bitsandbytes"), (2**31 - 1, "dequantize"))
    ]
    return TuningFile.of(CARD, rows, chunks={model_key(spec): 1024})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tuning, "bitsandbytes_available", lambda: True)
    monkeypatch.setattr(tuning, "packed_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def is_heuristic(spec: ModelSpec, caplog: pytest.LogCaptureFixture, *said: str) -> None:
    """No table is used, and one line of the log says why and how to tune."""
    with caplog.at_level(logging.INFO, logger=tuning.__name__):
        assert find_tuning(CARD, spec) is None
    [line] = caplog.messages
    for words in (*said, "heuristic", "`loramux-server tune --model MODEL`"):
        assert words in line


class TestChoices:
    def test_the_fastest_backend_holds_up_to_the_next_measured_row_count(self) -> None:
        rows = choices(measure(SHAPES, timer, rows=(1, 16, 17, 256), backends=BACKENDS))
        assert rows == [
            TuningRow(n=96, k=64, max_m=16, backend="bitsandbytes"),
            TuningRow(n=96, k=64, max_m=2**31 - 1, backend="dequantize"),
            TuningRow(n=128, k=64, max_m=2**31 - 1, backend="dequantize"),
        ]

    def test_a_shape_has_one_order_of_its_bytes(self) -> None:
        def one(m: int, packed: float, bitsandbytes: float, dequantize: float) -> Measured:
            return Measured(
                n=8, k=64, m=m, seconds={"packed": packed, "bitsandbytes": bitsandbytes, "dequantize": dequantize}
            )

        ours = [one(1, 2.0, 1.0, 9.0), one(8, 2.0, 8.0, 9.0), one(64, 3.0, 20.0, 9.0), one(512, 20.0, 20.0, 10.0)]
        assert choices(ours) == [
            TuningRow(n=8, k=64, max_m=64, backend="packed"),
            TuningRow(n=8, k=64, max_m=2**31 - 1, backend="dequantize"),
        ]
        theirs = [one(1, 2.0, 1.0, 9.0), one(8, 2.0, 1.0, 9.0), one(64, 3.0, 4.0, 2.0)]
        assert choices(theirs) == [
            TuningRow(n=8, k=64, max_m=8, backend="bitsandbytes"),
            TuningRow(n=8, k=64, max_m=2**31 - 1, backend="dequantize"),
        ]

    def test_all_products_of_a_layer_are_measured(self, spec: ModelSpec) -> None:
        inner, outer = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        assert set(product_shapes(spec)) == {
            (inner + 2 * outer, spec.hidden_size),
            (spec.hidden_size, inner),
            (2 * spec.intermediate_size, spec.hidden_size),
            (spec.hidden_size, spec.intermediate_size),
        }

    def test_the_report_shows_every_backend_and_the_choice(self) -> None:
        text = report([Measured(n=96, k=64, m=8, seconds={"dequantize": 10e-6, "bitsandbytes": 9e-6})])
        assert "dequantize     10.0 us" in text and text.endswith("-> bitsandbytes")


class TestFile:
    def test_a_table_survives_the_file_and_decides(self, cache: Path, spec: ModelSpec, file: TuningFile) -> None:
        file.save(tuning_path(CARD))
        found = find_tuning(CARD, spec)
        assert found == file == read_tuning(tuning_path(CARD))
        n, k = product_shapes(spec)[0]
        chosen = [found.table().choose(n, k, m, CUDA) for m in (1, 16, 17, 100_000)]
        assert chosen == ["bitsandbytes"] * 2 + ["dequantize"] * 2
        assert found.chunk(spec) == 1024
        assert [path for path in cache.rglob("*") if path.is_file()] == [cache / "loramux/tuning/Card-80GB.json"]

    def test_a_write_that_is_cut_short_leaves_the_old_table_alone(
        self, cache: Path, file: TuningFile, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file.save(tuning_path(CARD))
        before = tuning_path(CARD).read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(TuningFileError, match="No space left.*XDG_CACHE_HOME"):
            msgspec.structs.replace(file, chunks=[]).save(tuning_path(CARD))
        assert [path.read_bytes() for path in cache.rglob("*") if path.is_file()] == [before]

    def test_a_names_signs_do_not_leave_the_folder(self, cache: Path) -> None:
        assert tuning_path("../../x y/z").parent == cache / "loramux/tuning"

    def test_a_user_without_a_home_is_untuned(
        self, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def none() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", none)
        with caplog.at_level(logging.INFO, logger=tuning.__name__):
            assert find_tuning(CARD, spec) is None
        assert "XDG_CACHE_HOME" in caplog.text


class TestWhatDoesNotHold:
    def test_a_card_without_a_table_is_told_what_to_do(self, spec: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
        is_heuristic(spec, caplog, "no tuning table for Card 80GB")

    @pytest.mark.parametrize("field", ["torch", "bitsandbytes", "card"])
    def test_a_table_of_other_versions_or_another_card_is_not_used(
        self, spec: ModelSpec, file: TuningFile, field: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        here = {"card": CARD, **versions()}[field]
        msgspec.structs.replace(file, **{field: "0.1"}).save(tuning_path(CARD))
        is_heuristic(spec, caplog, "is not used", f"{field} 0.1 where {here} is here")

    def test_a_table_without_this_models_products_is_said_to_be_one(
        self, spec: ModelSpec, file: TuningFile, caplog: pytest.LogCaptureFixture
    ) -> None:
        msgspec.structs.replace(file, rows=file.rows[2:]).save(tuning_path(CARD))
        is_heuristic(spec, caplog, "nothing of this model's products")

    def test_a_backend_that_is_gone_is_left_to_the_heuristic(
        self, spec: ModelSpec, file: TuningFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        file.save(tuning_path(CARD))
        monkeypatch.setattr(tuning, "bitsandbytes_available", lambda: False)
        found = find_tuning(CARD, spec)
        n, k = product_shapes(spec)[0]
        assert found is not None and found.rows == []
        assert found.table().choose(n, k, 1, CUDA) == TuningTable().choose(n, k, 1, CUDA)
        assert found.chunk(spec) == 1024
        assert "not here" in caplog.text

    def test_our_product_gone_leaves_its_shapes_to_the_fused_one(
        self, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(linear, "bitsandbytes_available", lambda: True)
        (n, k), *others = product_shapes(spec)
        rows = [TuningRow(n=n, k=k, max_m=max_m, backend=name) for max_m, name in ((9, "packed"), (99, "dequantize"))]
        rows += [TuningRow(n=n, k=k, max_m=2**31 - 1, backend="dequantize") for n, k in others]
        TuningFile.of(CARD, rows).save(tuning_path(CARD))
        found = find_tuning(CARD, spec)
        assert found is not None and {(row.n, row.k) for row in found.rows} == set(others)
        chosen = [found.table().choose(*shape, 64, CUDA) for shape in ((n, k), others[0])]
        assert chosen == ["bitsandbytes", "dequantize"]

    def test_another_model_has_no_chunk(self, spec: ModelSpec, file: TuningFile) -> None:
        assert msgspec.structs.replace(file, chunks=[]).chunk(spec) is None
        assert file.chunk(ModelSpec.from_config({**_LLAMA, "num_hidden_layers": 9})) is None


_LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

Plain = dict[str, Any]


def changed(change: Callable[[Plain], object]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        plain = json.loads(text)
        change(plain)
        return json.dumps(plain)

    return apply


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "Expecting value"),
    "cut short": (lambda text: text[: len(text) // 2], "Expecting|Unterminated"),
    "another type": (lambda text: "[]", "object"),
    "nothing in it": (lambda text: "{}", "missing required field"),
    "nested without end": (lambda text: "[" * 200_000, "recursion"),
    "no text": (lambda text: "\udcff" + text, "decode"),
    "more than a table": (lambda text: text + " " * 2**20, "more than 1048576 bytes"),
    "a newer format": (changed(lambda plain: plain.update(version=4, sparse=True)), "format version 4 where 3 is read"),
    "an older format": (changed(lambda plain: plain.update(version=1)), "format version 1 where 3 is read"),
    "a version that is none": (changed(lambda plain: plain.update(version="3")), "version"),
    "not a number": (changed(lambda plain: plain["rows"][0].update(max_m=float("nan"))), "NaN is no number"),
    "infinite": (changed(lambda plain: plain["rows"][0].update(max_m=float("inf"))), "Infinity is no number"),
    "negative": (changed(lambda plain: plain["rows"][0].update(n=-96)), "rows"),
    "zero": (changed(lambda plain: plain["rows"][0].update(max_m=0)), "rows"),
    "text for a number": (changed(lambda plain: plain["rows"][0].update(k="64")), "rows"),
    "a fraction": (changed(lambda plain: plain["rows"][0].update(k=64.5)), "rows"),
    "beyond all bounds": (changed(lambda plain: plain["rows"][0].update(n=10**30)), "rows"),
    "an unknown backend": (changed(lambda plain: plain["rows"][0].update(backend="magic")), "magic"),
    "a backend of no NF4 bytes": (changed(lambda plain: plain["rows"][0].update(backend="dense")), "dense"),
    "an unknown field": (changed(lambda plain: plain["rows"][0].update(speed=1)), "speed"),
    "a row twice": (
        changed(lambda plain: plain["rows"].append({**plain["rows"][0], "backend": "dequantize"})),
        "two rows for one n, k and max_m",
    ),
    "a model twice": (changed(lambda plain: plain["chunks"].append(plain["chunks"][0])), "two chunks for one model"),
    "a chunk of nothing": (changed(lambda plain: plain["chunks"][0].update(tokens=0)), "chunks"),
    "a field twice": (lambda text: text.replace('"card"', '"torch"'), "a field is given twice"),
}


class TestDamage:
    @pytest.mark.parametrize("name", DAMAGE)
    def test_the_server_starts_without_it_and_says_what_is_wrong(
        self, name: str, spec: ModelSpec, file: TuningFile, caplog: pytest.LogCaptureFixture
    ) -> None:
        damage, said = DAMAGE[name]
        path = tuning_path(CARD)
        file.save(path)
        path.write_text(damage(path.read_text()), errors="surrogateescape")
        with pytest.raises(TuningFileError, match=rf"Card-80GB\.json is no tuning table: .*({said})"):
            read_tuning(path)
        is_heuristic(spec, caplog, "Card-80GB.json")

    @pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
    def test_what_is_no_file_does_not_hold_the_start_up(
        self, make: Callable[[Path], None], spec: ModelSpec, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tuning_path(CARD)
        path.parent.mkdir(parents=True)
        make(path)
        is_heuristic(spec, caplog, "Card-80GB.json")


class TestWriting:
    def test_other_models_of_the_same_versions_stay(self, spec: ModelSpec, file: TuningFile) -> None:
        path = tuning_path(CARD)
        other = TuningFile.of(
            CARD, [TuningRow(n=7, k=64, max_m=5, backend="dequantize")], chunks={"other": 256, model_key(spec): 512}
        )
        assert write(other, path) == [f"wrote {path}"]
        assert write(file, path) == [f"wrote {path}"]
        found = read_tuning(path)
        assert found is not None
        assert {row.n for row in found.rows} == {7, *(row.n for row in file.rows)}
        assert {chunk.model: chunk.tokens for chunk in found.chunks} == {"other": 256, model_key(spec): 1024}

    def test_what_was_measured_with_other_versions_is_replaced(self, file: TuningFile) -> None:
        path = tuning_path(CARD)
        older = TuningFile.of(CARD, [TuningRow(n=7, k=64, max_m=5, backend="dequantize")])
        msgspec.structs.replace(older, torch="1.0").save(path)
        first, last = write(file, path)
        assert "replaced a table that was measured with torch 1.0" in first and last == f"wrote {path}"
        assert read_tuning(path) == file

    def test_a_damaged_table_is_replaced(self, file: TuningFile) -> None:
        path = tuning_path(CARD)
        path.parent.mkdir(parents=True)
        path.write_text("{")
        assert write(file, path)[0].startswith("replaced what could not be used")
        assert read_tuning(path) == file


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is timed in no time: `tune` up to the file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(tune_command, "CudaTimer", lambda device, dtype: lambda backend, n, k, m: 1e-6 * len(backend))
    times = [ChunkTime(tokens=128, step_s=0.01), ChunkTime(tokens=256, step_s=0.011)]
    monkeypatch.setattr(tune_command, "prefill_times", lambda *arguments, **options: times)


@pytest.mark.usefixtures("card")
class TestCommand:
    def test_it_writes_what_it_measured(self, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "m")
        spec = ModelSpec.from_config(read_json(base / "config.json"))
        text = tune_command.tune(base)
        found = find_tuning(CARD, spec)
        assert found is not None and found.chunk(spec) == 256
        assert {row.backend for row in found.rows} == {"dequantize"}
        assert text.endswith(
            f"prefill chunk   256     11.00 ms a step     23,273 tokens/s  -> chosen\nwrote {tuning_path(CARD)}"
        )

    def test_a_dry_run_writes_nothing(self, tmp_path: Path, cache: Path) -> None:
        text = tune_command.tune(make_checkpoint(tmp_path / "m"), dry_run=True)
        assert text.endswith(f"nothing written, as asked; {tuning_path(CARD)} would be") and not cache.exists()

    def test_a_base_that_cannot_be_loaded_leaves_what_was_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object, **options: object) -> list[ChunkTime]:
            raise ConfigError("--model m: no weights")

        base = make_checkpoint(tmp_path / "m")
        spec = ModelSpec.from_config(read_json(base / "config.json"))
        monkeypatch.setattr(tune_command, "prefill_times", fail)
        with pytest.raises(ConfigError, match="no weights$"):
            tune_command.tune(base, dry_run=True)
        assert not tuning_path(CARD).exists()
        with pytest.raises(ConfigError, match=f"no weights; no prefill chunk .*: wrote {tuning_path(CARD)}"):
            tune_command.tune(base)
        found = find_tuning(CARD, spec)
        assert found is not None and found.rows and found.chunk(spec) is None

    def test_a_folder_that_cannot_be_written_is_told_before_measuring(
        self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.write_text("a file")
        monkeypatch.delattr(tune_command, "measure")
        with pytest.raises(TuningFileError, match="XDG_CACHE_HOME"):
            tune_command.tune(make_checkpoint(tmp_path / "m"))
