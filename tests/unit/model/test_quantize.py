"""The NF4 directory: bytes, layout that transformers and PEFT load, atomicity, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux_base import nf4
from loramux_base.checkpoint import Checkpoint, ModelLoadError
from loramux_base.fingerprint import CACHE_NAME, base_fingerprint
from loramux_server.model import quantize as module
from loramux_server.model.load import load_model
from loramux_server.model.packing import Chunk, PagedSequences
from loramux_server.model.quantize import QuantizeError, quantize_checkpoint
from tests.support.tiny_models import FAMILIES, make_adapter, make_checkpoint

TOLERANCE = 2e-5
"""Largest |logit difference| to transformers on the same bytes in float32."""
IDS = torch.randint(512, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def our_logits(directory: Path) -> torch.Tensor:
    model = load_model(directory, weights="nf4", device="cpu")
    cache = PagedSequences(model.spec, sequences=1, length=40, dtype=model.dtype, device=model.device)
    return model.logits(model.forward(cache.pack([Chunk(sequence=0, start=0, token_ids=IDS)]), cache.kv))


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> torch.Tensor:
    # training mode: in eval mode bitsandbytes repacks the weights for a bfloat16 product on CPUs that have it
    return model.train()(input_ids=torch.tensor([IDS])).logits[0]


def in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """Transformers leaves other weights as stored and computes as the file says, whatever dtype is asked for."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.compute_dtype = torch.float32
    return model


def transformers_model(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_bytes(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = quantize_checkpoint(checkpoint(family), tmp_path / "nf4")
    model = transformers_model(directory)
    source = load_file(checkpoint(family) / "model.safetensors")
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert len(linears) == (8 if family == "phi3" else 14)
    for name, layer in linears.items():
        ours = nf4.quantize(source[f"{name}.weight"])
        assert torch.equal(layer.weight.data.view(-1), ours.codes.view(-1)), name
        assert torch.equal(layer.weight.quant_state.absmax, ours.absmax.view(-1)), name
    assert (our_logits(directory) - their_logits(model)).abs().max() <= TOLERANCE


def test_bfloat16_source(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", dtype="bfloat16")
    directory = quantize_checkpoint(base, tmp_path / "nf4")
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    kept = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(kept, load_file(base / "model.safetensors")["model.embed_tokens.weight"])
    model = transformers_model(directory)
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.dtype == torch.bfloat16
    ours = our_logits(directory)
    assert (ours - their_logits(in_float32(model))).abs().max() <= TOLERANCE


def test_peft_loads_it(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import PeftModel

    directory = quantize_checkpoint(checkpoint("qwen2"), tmp_path / "nf4")
    adapter = make_adapter(tmp_path / "adapter", checkpoint("qwen2"), rank=4, alpha=8, seed=3)
    plain = their_logits(transformers_model(directory))
    adapted = their_logits(PeftModel.from_pretrained(transformers_model(directory), str(adapter)))
    assert torch.isfinite(adapted).all() and (adapted - plain).abs().max() > 0.1


def test_directory_is_complete(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("qwen2")
    (source / CACHE_NAME).write_text("{}")
    steps: list[tuple[int, int, str]] = []
    directory = quantize_checkpoint(source, tmp_path / "nf4", progress=lambda *step: steps.append(step))
    names = {file.name for file in directory.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    ids = AutoTokenizer.from_pretrained(directory)("Hello").input_ids
    assert ids == AutoTokenizer.from_pretrained(source)("Hello").input_ids
    total = len(Checkpoint(source).tensors)
    assert [step[:2] for step in steps] == [(done, total) for done in range(1, total + 1)]
    before, after = base_fingerprint(source), base_fingerprint(directory)
    assert after.differences(before.parts) == ("quantization", "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["nf4"]


def test_shards_hold_the_same_base(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole = quantize_checkpoint(checkpoint("llama"), tmp_path / "whole")
    shards = quantize_checkpoint(checkpoint("llama"), tmp_path / "shards", shard_bytes=50_000)
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 2
    assert base_fingerprint(whole) == base_fingerprint(shards)
    assert torch.equal(our_logits(whole), our_logits(shards))
    assert torch.equal(their_logits(transformers_model(whole)), their_logits(transformers_model(shards)))


def test_quantizing_twice_gives_equal_bytes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    first, second = (quantize_checkpoint(checkpoint("qwen3"), tmp_path / name) for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_existing_destination_is_kept(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "mine").write_text("x")
    with pytest.raises(QuantizeError, match="exists; give a new directory"):
        quantize_checkpoint(checkpoint("qwen2"), tmp_path / "nf4")
    assert [file.name for file in (tmp_path / "nf4").iterdir()] == ["mine"]


def test_no_parent(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="create it first"):
        quantize_checkpoint(checkpoint("qwen2"), tmp_path / "none" / "nf4")


def test_failure_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        quantize_checkpoint(checkpoint("qwen2"), tmp_path / "nf4")
    assert list(tmp_path.iterdir()) == []


def test_sources_that_cannot_be_quantized(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    once = quantize_checkpoint(checkpoint("qwen2"), tmp_path / "once")
    with pytest.raises(QuantizeError, match="quantized already"):
        quantize_checkpoint(once, tmp_path / "twice")
    narrow = make_checkpoint(tmp_path / "narrow", "llama", hidden=96)
    with pytest.raises(QuantizeError, match="no multiple of 64"):
        quantize_checkpoint(narrow, tmp_path / "out")
    broken = make_checkpoint(tmp_path / "broken", "llama")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = torch.inf
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(QuantizeError, match="layers.1.mlp.down_proj.weight: the weight holds NaN or infinity"):
        quantize_checkpoint(broken, tmp_path / "out")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ModelLoadError, match="no tensor model.layers.1.mlp.down_proj.weight"):
        quantize_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
