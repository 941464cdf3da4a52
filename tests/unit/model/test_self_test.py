"""The start-up check passes for every family and fails when a flag is read wrongly."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramux_base.checkpoint import Checkpoint
from loramux_server.model import self_test as module
from loramux_server.model.self_test import SelfTestError, self_test, shrink_config
from loramux_server.model.spec import ModelSpec
from tests.support.tiny_models import FAMILIES, make_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_passes(family: str, checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.from_config(Checkpoint(checkpoint(family)).config)
    assert self_test(spec, device=CPU, dtype=torch.float32) < 2e-6


def test_passes_in_bfloat16(checkpoint: Callable[[str], Path]) -> None:
    spec = ModelSpec.from_config(Checkpoint(checkpoint("llama")).config)
    assert 1e-3 < self_test(spec, device=CPU, dtype=torch.bfloat16) < 0.03


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen2", {"attention_scale": 0.3}),
        ("qwen3", {"rms_eps": 1e-3}),
        ("llama", {"activation": "gelu_tanh"}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma2", {"embedding_multiplier": 1.0}),
        ("gemma3", {"norm_offset": 0.0}),
    ],
)
def test_a_wrong_flag_fails(
    family: str, change: dict[str, object], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec.from_config(Checkpoint(checkpoint(family)).config)
    right = module.assemble

    def wrong(small: ModelSpec, *args: object, **options: object) -> object:
        return right(dataclasses.replace(small, **change), *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "assemble", wrong)
    with pytest.raises(SelfTestError, match="differ from transformers"):
        self_test(spec, device=CPU, dtype=torch.float32)


def test_small_config_keeps_what_kernels_depend_on() -> None:
    big = make_config("gemma3", hidden=1024, heads=8, kv_heads=2, layers=12, head_dim=256, sliding_window=512)
    fields = big.to_diff_dict() | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 7}
    small = ModelSpec.from_config(shrink_config(ModelSpec.from_config(fields)))
    assert small.head_dim == 256 and small.num_heads // small.num_kv_heads == 4
    assert [layer.window for layer in small.layers] == [16, None]
    assert small.hidden_size == 256 and small.num_layers == 2
