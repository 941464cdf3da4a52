"""Size of the KV pool against the model's range."""

import dataclasses
from pathlib import Path

import pytest
import torch

from loramux_base.checkpoint import read_json
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.memory import BadModelLength, KvPlan, NotEnoughMemory, allocate_kv, plan_kv
from loramux_server.engine.runner import NoDevice, build_runner
from loramux_server.model.spec import ModelSpec
from tests.support.tiny_models import make_checkpoint, make_config

POSITIONS = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("memory") / "base", max_position=POSITIONS)


def plan(base: Path, **fields: object) -> KvPlan:
    def never() -> None:
        raise AssertionError("nothing is measured on CPU")

    spec = ModelSpec.from_config(read_json(base / "config.json"))
    config = EngineConfig(model=str(base), page_size=4, **fields)  # type: ignore[arg-type]
    return plan_kv(config, spec, dtype=torch.float32, device=torch.device("cpu"), largest_step=never)


def test_the_length_is_the_models_unless_told_or_the_pool_is_smaller(base: Path) -> None:
    assert plan(base, kv_pages=100).max_model_len == POSITIONS
    assert plan(base, kv_pages=100, max_model_len=POSITIONS).max_model_len == POSITIONS
    assert plan(base, kv_pages=100, max_model_len=20).max_model_len == 20
    assert plan(base, kv_pages=5).max_model_len == 20
    sized = plan(base, kv_tokens=30)
    assert (sized.pages, sized.max_model_len) == (8, 32)


@pytest.mark.parametrize("length", [POSITIONS + 1, 10**6, 1, 0, -3])
def test_a_length_out_of_the_models_range_is_refused(base: Path, length: int) -> None:
    with pytest.raises(BadModelLength, match=rf"max_model_len: {length} is out of \[2, {POSITIONS}\].*--max-model-len"):
        plan(base, kv_pages=10**7, max_model_len=length)


def test_a_pool_that_cannot_hold_one_request_is_refused(base: Path) -> None:
    with pytest.raises(NotEnoughMemory, match="--kv-pages"):
        plan(base, kv_pages=4, max_model_len=17)


@pytest.mark.parametrize("fields", [{"max_running": 1}, {"max_batch_tokens": 3}, {"kv_pages": 2, "prefill_chunk": 1}])
def test_small_settings_warm_up(base: Path, fields: dict[str, int]) -> None:
    config = EngineConfig(
        model=str(base), weights="fp32", device="cpu", threads=1, self_test=False, page_size=4, kv_tokens=256, **fields
    )
    runner = build_runner(config)
    parts = {name: value for name, value in runner.ready.details.items() if name.startswith("fingerprint.")}
    runner.close()
    assert set(parts) == {
        f"fingerprint.{name}" for name in ("config", "weights", "tokenizer", "quantization", "chat_template")
    }
    assert all(len(value) == 64 for value in parts.values())
    assert dataclasses.asdict(plan(base, kv_tokens=256))["pages"] == 64


def test_a_pool_past_the_memory_names_its_flag() -> None:
    spec = ModelSpec.from_config(make_config("qwen2").to_diff_dict())
    with pytest.raises(NotEnoughMemory, match=r"9000000000000 pages needs .* GiB on cpu.*--kv-pages"):
        allocate_kv(spec, pages=9_000_000_000_000, page_size=16, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(NoDevice, match="--device cpu"):
        build_runner(EngineConfig(model="nowhere", device="cuda"))
