"""Predicted against actual memory: the numbers that travel, the table, the warnings."""

import dataclasses
from pathlib import Path

import pytest
import torch

from loramux_base.checkpoint import read_json
from loramux_base.shapes import base_shapes
from loramux_server.engine.capacity import plan_capacity
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.device_memory import MemoryMeter, predicted
from loramux_server.engine.footprint import Footprint, memory_table, warnings
from loramux_server.engine.runner import build_runner
from loramux_server.model.spec import ModelSpec
from loramux_server.run import banner
from tests.support.tiny_models import make_checkpoint

GIB = 2**30
PLANNED = Footprint(weight_bytes=5 * GIB, adapter_bytes=3 * GIB, kv_bytes=60 * GIB, step_bytes=2 * GIB, kv_pages=1000)


def with_(**fields: int | None) -> Footprint:
    return dataclasses.replace(PLANNED, **fields)  # type: ignore[arg-type]


def details(actual: Footprint, **more: str) -> dict[str, str]:
    return PLANNED.details("planned") | actual.details("actual") | more


def cells(table: str) -> dict[str, list[str]]:
    """Columns by label; columns are two spaces or more apart."""
    rows = [[cell for cell in line.split("  ") if cell.strip()] for line in table.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


class TestTable:
    def test_each_part_stands_beside_its_own_prediction(self) -> None:
        actual = Footprint(weight_bytes=6 * GIB, adapter_bytes=3 * GIB, kv_bytes=57 * GIB, step_bytes=GIB, kv_pages=950)
        found = cells(memory_table(details(actual)))
        assert found["memory"] == ["predicted", "actual", "difference"]
        assert found["weights"] == ["5.00 GiB", "6.00 GiB", "+20.0 %"]
        assert found["adapter slab and staging"] == ["3.00 GiB", "3.00 GiB", "+0.0 %"]
        assert found["KV pages (950)"] == ["60.00 GiB", "57.00 GiB", "-5.0 %"]
        assert found["activations, graphs, workspace"] == ["2.00 GiB", "1.00 GiB", "-50.0 %"]
        assert found["together"] == ["70.00 GiB", "67.00 GiB", "-4.3 %"]

    def test_small_sizes_are_told_in_mebibytes(self) -> None:
        found = cells(memory_table(details(with_(weight_bytes=3 * 2**20))))
        assert found["weights"][1] == "3.0 MiB"

    def test_what_the_device_says_closes_it(self) -> None:
        numbers = {"actual.device_bytes": str(71 * GIB), "device_bytes": str(80 * GIB)}
        text = memory_table(details(PLANNED, **numbers))
        assert text.splitlines()[-1] == "the device reports 71.00 GiB of 80.00 GiB in use, by everyone"

    def test_what_is_not_measured_is_in_no_sum(self) -> None:
        found = cells(memory_table(details(with_(step_bytes=None))))
        assert found["activations, graphs, workspace"] == ["2.00 GiB", "not known"]
        assert found["together, without steps"] == ["68.00 GiB", "68.00 GiB", "+0.0 %"]

    def test_a_server_prints_it_below_its_address(self) -> None:
        first, second, *_ = banner("127.0.0.1:50051", details(PLANNED)).splitlines()
        assert first == "loramux serving on 127.0.0.1:50051" and second.split()[:2] == ["memory", "predicted"]
        assert banner("127.0.0.1:50051", {}) == "loramux serving on 127.0.0.1:50051"

    def test_an_engine_that_reports_none_gets_no_table(self) -> None:
        assert memory_table({}) == "" and memory_table(PLANNED.details("planned")) == ""


class TestDetails:
    def test_they_come_back_as_they_went(self) -> None:
        actual = with_(kv_pages=7, step_bytes=None)
        both = details(actual)
        assert Footprint.read(both, "planned") == PLANNED and Footprint.read(both, "actual") == actual
        assert both["planned.adapter_bytes"] == str(3 * GIB) and "actual.step_bytes" not in both


class TestWarnings:
    @pytest.mark.parametrize(
        ("field", "flag"),
        [
            ("weight_bytes", "--no-shadow"),
            ("adapter_bytes", "--rank-units"),
            ("kv_bytes", "--kv-pages"),
            ("step_bytes", "--max-batch-tokens"),
        ],
    )
    def test_a_part_over_its_prediction_names_what_to_change(self, field: str, flag: str) -> None:
        planned = getattr(PLANNED, field)
        [line] = warnings(PLANNED, with_(**{field: int(1.06 * planned)}))
        assert flag in line and "5% over" in line and f"{planned / GIB:.2f} GiB were predicted" in line
        assert warnings(PLANNED, with_(**{field: int(1.04 * planned)})) == []
        assert warnings(PLANNED, with_(**{field: planned // 2})) == []

    def test_a_few_mebibytes_are_rounding(self) -> None:
        tiny = Footprint(weight_bytes=2**20, adapter_bytes=0, kv_bytes=2**20, step_bytes=2**20, kv_pages=9)
        assert warnings(tiny, dataclasses.replace(tiny, weight_bytes=2**22, step_bytes=2**25)) == []

    def test_missing_pages_are_told(self) -> None:
        [line] = warnings(PLANNED, with_(kv_pages=900))
        assert "900 KV pages where 1000 were predicted" in line and "--gpu-memory-utilization" in line
        assert warnings(PLANNED, with_(kv_pages=960)) == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("footprint") / "base")


def test_an_engine_on_the_cpu_takes_what_was_predicted(base: Path) -> None:
    config = EngineConfig(
        model=str(base), device="cpu", kv_tokens=4096, self_test=False, max_batch_tokens=64, max_running=8, max_slots=3
    )
    runner = build_runner(config)
    ready = runner.ready.details
    runner.close()
    planned, actual = Footprint.read(ready, "planned"), Footprint.read(ready, "actual")
    assert planned is not None and actual is not None and actual.step_bytes is None
    assert dataclasses.replace(planned, step_bytes=None) == actual
    assert len({actual.weight_bytes, actual.adapter_bytes, actual.kv_bytes, actual.kv_pages}) == 4
    assert runner.ready.resident_weight_bytes == actual.weight_bytes and runner.ready.kv_pages == actual.kv_pages
    assert int(ready["actual.process_bytes"]) > actual.weight_bytes + actual.adapter_bytes + actual.kv_bytes
    assert memory_table(ready).count("+0.0 %") == 4


def test_the_prediction_is_the_plans(base: Path) -> None:
    raw = read_json(base / "config.json")
    spec, shapes = ModelSpec.from_config(raw), base_shapes(raw)
    config = EngineConfig(model=str(base), device="auto", kv_pages=77)
    capacity = plan_capacity(EngineConfig(model=str(base), device="cpu", kv_pages=77), spec, shapes, memory=0)
    found = predicted(config, spec, shapes, torch.device("cpu"))
    assert (found.weight_bytes, found.kv_pages, found.step_bytes) == (capacity.weights, 77, capacity.workspace)
    assert found.adapter_bytes == capacity.slab + capacity.staging
    assert found.kv_bytes == 78 * capacity.page


class TestMeter:
    def test_on_cuda_the_allocator_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = iter([100, 150, 157, 457])
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(told))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 5000))
        meter = MemoryMeter(torch.device("cuda", 0))
        assert [meter.take(1), meter.take(1), meter.take(1)] == [50, 7, 300]
        assert meter.steps(357) == 643
        assert meter.totals() == {"actual.device_bytes": "2000", "device_bytes": "5000"}

    def test_on_the_cpu_tensors_tell(self) -> None:
        meter = MemoryMeter(torch.device("cpu"))
        assert meter.take(12) == 12 and meter.steps(12) is None
