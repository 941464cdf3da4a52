"""What `loramux-server plan` predicts is what loading takes."""

from pathlib import Path

import msgspec
import pytest
import torch

from loramux_base.checkpoint import read_json
from loramux_base.shapes import base_shapes
from loramux_server.engine.capacity import Capacity, plan_capacity, unit_bytes, weight_bytes
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.memory import allocate_kv
from loramux_server.engine.runner import build_runner
from loramux_server.model.load import load_model
from loramux_server.model.slab import LoraSlab
from loramux_server.model.spec import ModelSpec
from tests.support.tiny_models import FAMILIES, make_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("weights", "shadow"), [("fp32", False), ("nf4", True), ("nf4", False)])
def test_weights_take_what_was_predicted(tmp_path: Path, family: str, weights: str, shadow: bool) -> None:
    directory = make_checkpoint(tmp_path / "m", family)
    spec = ModelSpec.from_config(read_json(directory / "config.json"))
    model = load_model(directory, weights=weights, device=CPU, shadow=shadow)
    predicted = weight_bytes(spec, weights=weights, dtype=model.dtype, shadow=shadow)
    assert predicted == model.resident_weight_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slab_and_pages_take_what_was_predicted(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama", kv_heads=4)
    config = read_json(directory / "config.json")
    spec, shapes = ModelSpec.from_config(config), base_shapes(config)
    settings = EngineConfig(model="", device="cuda", weights="bf16", rank_units=5, max_slots=3, kv_pages=7, page_size=8)
    capacity = plan_capacity(settings, spec, shapes, memory=10**9)
    slab = LoraSlab(shapes, rank_units=5, max_slots=3, max_rank=16, dtype=dtype, device=CPU)
    assert unit_bytes(shapes, dtype) * 5 + (capacity.slab - capacity.unit * 5) == slab.nbytes
    kv = allocate_kv(spec, pages=7, page_size=8, dtype=torch.bfloat16, device=CPU)
    assert capacity.page * (7 + 1) == sum(layer.nbytes for layer in kv)


def test_an_engine_gets_what_was_planned(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m")
    config = EngineConfig(
        model=str(directory), device="cpu", kv_tokens=512, self_test=False, max_batch_tokens=64, max_running=8
    )
    runner = build_runner(config)
    raw = read_json(directory / "config.json")
    capacity = plan_capacity(config, ModelSpec.from_config(raw), base_shapes(raw), memory=0)
    assert capacity.weights == runner.ready.resident_weight_bytes
    assert capacity.pages == runner.ready.kv_pages
    assert capacity.pages * capacity.page == int(runner.ready.details["kv_bytes"])
    assert runner.ready.details["planned.weight_bytes"] == str(capacity.weights)
    assert runner.ready.details["planned.kv_pages"] == str(capacity.pages)
    runner.close()


class TestFit:
    def plan(self, memory: float, **fields: object) -> Capacity:
        config = EngineConfig(model="", device="cuda", max_batch_tokens=256, max_running=8, rank_units=2, max_slots=2)
        config = msgspec.structs.replace(config, **fields)
        raw = {
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        }
        return plan_capacity(config, ModelSpec.from_config(raw), base_shapes(raw), memory=int(memory * 2**20))

    def test_pages_fill_what_is_left(self) -> None:
        capacity = self.plan(100)
        taken = (
            capacity.weights + capacity.slab + capacity.staging + capacity.workspace + capacity.pages * capacity.page
        )
        assert 0 <= 0.9 * 100 * 2**20 - taken < capacity.page
        assert capacity.requests(4096) == capacity.tokens // 4096

    def test_more_adapters_leave_fewer_pages(self) -> None:
        assert self.plan(100, rank_units=32).pages < self.plan(100).pages

    def test_a_small_device_fits_nothing(self) -> None:
        capacity = self.plan(4)
        assert capacity.pages <= 0 and capacity.tokens == 0 and capacity.requests(16) == 0

    def test_a_shadow_takes_more_than_the_bytes(self) -> None:
        assert self.plan(100, shadow=True).weights > self.plan(100, shadow=False).weights
