"""Weights modes of `load_model`, what it reports and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_base.checkpoint import ModelLoadError
from loramux_base.fingerprint import base_fingerprint
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.load import load_model
from loramux_server.model.packing import Chunk, PagedSequences
from loramux_server.model.quantize import quantize_checkpoint
from loramux_server.model.spec import UnsupportedModel
from tests.support.tiny_models import make_checkpoint

IDS = torch.randint(512, (33,), generator=torch.Generator().manual_seed(5)).tolist()


def logits(model: CausalLM) -> torch.Tensor:
    cache = PagedSequences(model.spec, sequences=1, length=33, dtype=model.dtype, device=model.device)
    return model.logits(model.forward(cache.pack([Chunk(sequence=0, start=0, token_ids=IDS)]), cache.kv))


@pytest.fixture
def base(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint("qwen2"), tmp_path / "copy")


def test_fp32_reports(base: Path) -> None:
    done: list[tuple[int, int]] = []
    model = load_model(base, weights="fp32", device="cpu", progress=lambda *step: done.append(step))
    assert model.dtype == torch.float32 and model.device == torch.device("cpu") and done == [(1, 2), (2, 2)]
    stored = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    tables = 2048 * 2 * 8 * 4
    assert model.resident_weight_bytes == stored + tables == model.details["resident_weight_bytes"]
    assert model.details["weights"] == "fp32" and not model.details["quantized_at_load"]
    assert model.fingerprint == base_fingerprint(base)


def test_rotary_tables_can_be_shorter(base: Path) -> None:
    model = load_model(base, weights="fp32", device="cpu", max_positions=64)
    assert torch.equal(logits(model), logits(load_model(base, weights="fp32", device="cpu")))
    whole = load_model(base, weights="fp32", device="cpu").resident_weight_bytes
    assert whole - model.resident_weight_bytes == (2048 - 64) * 2 * 8 * 4


def test_bf16_rounds_the_weights_and_computes_in_float32_on_the_cpu(base: Path) -> None:
    model = load_model(base, weights="bf16", device="cpu")
    assert model.dtype == torch.float32 and model.details["compute_dtype"] == "float32"
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(rounded, base / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(model), logits(load_model(base, weights="fp32", device="cpu")))


def test_bf16_compute_on_request(base: Path) -> None:
    model = load_model(base, weights="bf16", device="cpu", dtype=torch.bfloat16)
    exact = logits(load_model(base, weights="fp32", device="cpu"))
    assert model.dtype == torch.bfloat16
    assert (logits(model) - exact).abs().max() < 0.25 * exact.std()


def test_nf4_at_load_equals_quantized_directory(base: Path, tmp_path: Path) -> None:
    quantized = quantize_checkpoint(base, tmp_path / "nf4")
    stored, at_load = (load_model(path, weights="nf4", device="cpu") for path in (quantized, base))
    assert torch.equal(logits(stored), logits(at_load))
    assert (stored.details["quantized_at_load"], at_load.details["quantized_at_load"]) == (False, True)
    assert stored.fingerprint is not None and at_load.fingerprint is not None
    assert "quantization" in at_load.fingerprint.differences(stored.fingerprint.parts)
    assert at_load.fingerprint.differences(base_fingerprint(base).parts) == ("quantization",)


def test_shadow_costs_bytes_and_changes_no_bit(base: Path) -> None:
    shadow = load_model(base, weights="nf4", device="cpu")
    codes = load_model(base, weights="nf4", device="cpu", shadow=False)
    assert torch.equal(logits(shadow), logits(codes))
    assert shadow.details["shadow"] and not codes.details["shadow"]
    assert (shadow.details["decode_product"], codes.details["decode_product"]) == ("dense", "dequantize")
    assert codes.linear_weight_bytes < 0.2 * shadow.linear_weight_bytes


def test_weights_do_not_depend_on_the_file_afterwards(base: Path) -> None:
    model = load_model(base, weights="fp32", device="cpu")
    before = logits(model)
    file = base / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\0" * file.stat().st_size)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_quantized_directory_serves_nf4_only(base: Path, tmp_path: Path, weights: str) -> None:
    quantized = quantize_checkpoint(base, tmp_path / "nf4")
    with pytest.raises(ModelLoadError, match=f"--weights {weights} cannot be served; use --weights nf4"):
        load_model(quantized, weights=weights, device="cpu")


def test_unknown_mode(base: Path) -> None:
    with pytest.raises(ModelLoadError, match="weights: 'int8' is none of nf4, bf16, fp32"):
        load_model(base, weights="int8", device="cpu")


@pytest.mark.parametrize("change", [{"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}])
def test_other_quantizations(base: Path, change: dict[str, object]) -> None:
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": change}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="is not served; serve the original"):
        load_model(base, weights="nf4", device="cpu")


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), "no tensor model.layers.0.self_attn.k_proj.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight: has shape \(3,\)"),
        (lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(64, 64)}), "joined shape"),
        (lambda t: t.update({"model.layers.0.mlp.down_proj.bias": torch.ones(64)}), "a bias that the config"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}), "not floating point"),
        (lambda t: t["model.layers.0.mlp.down_proj.weight"].fill_(torch.nan), "NaN or infinity"),
    ],
)
def test_damaged_checkpoints(base: Path, change: Callable[[dict[str, torch.Tensor]], object], match: str) -> None:
    rewrite(base, change)
    with pytest.raises(ModelLoadError, match=match):
        load_model(base, weights="nf4", device="cpu")


def test_truncated_and_pickled(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: .*truncated"):
        load_model(base, weights="fp32", device="cpu")
    file.rename(base / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="runs code"):
        load_model(base, weights="fp32", device="cpu")


def test_code_of_the_directory_is_never_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config.update(model_type="strange", auto_map={"AutoConfig": "evil.Config"})
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModel, match="model_type: 'strange' is not served"):
        load_model(base, weights="fp32", device="cpu")


def test_width_that_blocks_do_not_divide(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "llama", hidden=96)
    with pytest.raises(ModelLoadError, match="multiple of 64"):
        load_model(base, weights="nf4", device="cpu")
    assert load_model(base, weights="fp32", device="cpu").spec.hidden_size == 96
