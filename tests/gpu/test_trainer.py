"""Training on CUDA: 4-bit base, bfloat16 products, float32 adapter; the adapter means the same on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from loramux_server.model.quantize import quantize_checkpoint
from loramux_trainer.assess import assess
from loramux_trainer.base import choose_numerics, load_model, open_base
from loramux_trainer.config import LoraConfig, RunConfig
from loramux_trainer.lora import add_lora
from loramux_trainer.run import Result, train
from tests.support.tiny_models import make_checkpoint

TOLERANCE = 0.05
"""Nats a token, on average: bfloat16 against float32."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    return quantize_checkpoint(make_checkpoint(root / "dense", "qwen2", hidden=256, layers=4), root / "nf4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"dialogue": [{"user": f"Order {n}?", "assistant": f"Order {n} is on its way."}]} for n in range(120)]
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _train(base: Path, data: Path, output: Path, **settings: Any) -> Result:
    config = RunConfig.model_validate(
        {
            "base": base,
            "output": output,
            "device": "cuda",
            "data": {"train": [data]},
            "lora": {"r": 8, "alpha": 16},
            "train": {"epochs": 3.0, "batch_size": 8, "learning_rate": 2e-3, "eval_steps": 14, **settings},
        }
    )
    return train(config, console=Console(quiet=True))


def test_the_base_stays_in_four_bits_and_the_adapter_in_float32(base: Path) -> None:
    numerics = choose_numerics("cuda")
    model = add_lora(load_model(open_base(base), numerics), LoraConfig(r=8), seed=1)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    quantized = [module for module in linears if hasattr(module, "compute_dtype")]
    assert len(quantized) == 28
    assert {module.compute_dtype for module in quantized} == {torch.bfloat16}
    assert {module.weight.dtype for module in quantized} == {torch.uint8}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 56
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.uint8, torch.bfloat16}


def test_gradients_of_attention_are_finite_where_cudnns_are_not(base: Path) -> None:
    """Every score is near -120 and the length is 64 over a multiple of 128 (pytorch/pytorch#196678)."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(open_base(base), choose_numerics("cuda"))
    torch.manual_seed(0)
    length, width = 192, 64
    query, key, value = (torch.randn(1, 1, length, width, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -120 * width**0.5
    query.requires_grad_()
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out.backward(torch.randn_like(out))
    assert query.grad is not None and bool(torch.isfinite(query.grad).all())


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_it_learns_and_means_the_same_on_the_cpu(base: Path, data: Path, tmp_path: Path, optimizer: str) -> None:
    result = _train(base, data, tmp_path / "run", optimizer=optimizer)
    evaluation = result.manifest["evaluation"]
    assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"] - 1
    assert result.manifest["numerics"] == {"base": "nf4", "compute": "bfloat16", "adapter": "float32"}
    there, here = (assess(result.adapter, base, [data], device=device, batch_size=16) for device in ("cuda", "cpu"))
    assert there.base.loss == pytest.approx(here.base.loss, abs=TOLERANCE)
    assert there.adapter.loss == pytest.approx(here.adapter.loss, abs=TOLERANCE)
    assert there.base.total.tokens == here.base.total.tokens
