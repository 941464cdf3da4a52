import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loramux_base import nf4
from loramux_base.fingerprint import base_fingerprint
from loramux_server.model import spec
from loramux_server.model.load import load_model as load_served
from loramux_trainer.base import FAMILIES, choose_numerics, load_model, open_base
from loramux_trainer.errors import ConfigError
from tests.support.tiny_models import make_checkpoint

CPU = choose_numerics("cpu")


def test_the_cpu_trains_on_exactly_the_served_weights(base: Path) -> None:
    model = load_model(open_base(base), CPU)
    stored = load_file(base / "model.safetensors")
    quantized = 0
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        if name + nf4.SUFFIX_STATE in stored:
            expected = nf4.dequantize(nf4.from_tensors(name, stored.__getitem__, nested=False), torch.float32)
            quantized += 1
        else:
            expected = stored[name].float()
        assert torch.equal(parameter, expected), name
    assert quantized == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_a_dense_base_gives_the_logits_of_transformers(dense: Path) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = load_model(open_base(dense), CPU).eval()(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_fingerprint_is_the_one_that_the_server_reports(base: Path) -> None:
    served = load_served(base, weights="nf4", device="cpu", dtype=torch.float32)
    assert served.fingerprint is not None
    assert open_base(base).fingerprint.hex == served.fingerprint.hex == base_fingerprint(base).hex


def test_a_base_that_cannot_be_trained_on_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        open_base(tmp_path / "none")
    with pytest.raises(ConfigError, match="phi3"):
        open_base(make_checkpoint(tmp_path / "phi3", "phi3"))
    copy = tmp_path / "gptq"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantized as 'gptq', not as NF4"):
        open_base(copy)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "bert"}, "model_type is 'bert', which the server does not serve; take one of llama"),
        ({"model_type": None}, "model_type is None"),
        ({"quantization_config": "nf4"}, "is quantized as 'nf4', not as NF4"),
        ({"hidden_act": "none such"}, r"config\.json: transformers refuses it"),
        ({"vocab_size": 1 << 20}, r"config\.json does not fit its tensors: size mismatch for .*embed_tokens"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    base: Path, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=f"^base: .*{reason}"):
        load_model(open_base(copy), CPU)


def test_files_of_a_base_that_cannot_be_read_are_named(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="^base: .*nested too deeply"):
        open_base(copy)
    with pytest.raises(ConfigError, match=r"^base: .*cannot be read \(File name too long\)"):
        open_base(tmp_path / ("x" * 300))


def test_the_families_are_those_that_the_server_takes_adapters_for() -> None:
    assert {*FAMILIES, "phi3"} == set(spec.FAMILIES)


def test_missing_tensors_are_named(dense: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dense, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"for example model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(open_base(copy), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_numerics("cuda")
    assert choose_numerics("auto") == CPU
