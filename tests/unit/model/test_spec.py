"""Flags read from config.json; what is unknown is refused by name, with the families that are served."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from loramux_server.model.rope import RopeSpec, cos_sin
from loramux_server.model.spec import FAMILIES, ModelSpec, UnsupportedModel
from tests.support.tiny_models import make_config


def config(family: str = "qwen2", **overrides: Any) -> dict[str, Any]:
    return make_config(family, **overrides).to_diff_dict() | {"architectures": [FAMILIES[_kind(family)]]}


def _kind(family: str) -> str:
    return "gemma3_text" if family == "gemma3" else family


def test_qwen2() -> None:
    spec = ModelSpec.from_config(config())
    assert spec.qkv_bias and not spec.output_bias and not spec.qk_norm and not spec.sandwich_norms
    assert spec.tied_embeddings and spec.num_layers == 2 and spec.layers[0].window is None
    assert spec.attention_scale == 16**-0.5 and spec.embedding_multiplier == 1.0 and spec.norm_offset == 0.0


def test_gemma2() -> None:
    spec = ModelSpec.from_config(config("gemma2"))
    assert spec.sandwich_norms and spec.norm_offset == 1.0 and spec.activation == "gelu_tanh"
    assert spec.attention_softcap == 20.0 and spec.final_softcap == 10.0
    assert spec.attention_scale == 24**-0.5 and spec.embedding_multiplier == 8.0
    assert [layer.window for layer in spec.layers] == [16, None]


def test_gemma3_has_two_rotary_settings() -> None:
    spec = ModelSpec.from_config(config("gemma3"))
    assert spec.qk_norm and len(spec.ropes) == 2 and spec.attention_softcap is None
    local, full = (spec.ropes[layer.rope] for layer in spec.layers)
    assert (local.theta, local.kind) == (1e4, "default") and (full.theta, full.kind, full.factor) == (1e6, "linear", 4)


def test_gemma3_older_layout() -> None:
    old = config("gemma3")
    for key in ("rope_parameters", "layer_types"):
        del old[key]
    old.update(
        num_hidden_layers=7,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=6,
    )
    spec = ModelSpec.from_config(old)
    assert [layer.window for layer in spec.layers] == [16] * 5 + [None, 16]
    assert spec.ropes[spec.layers[5].rope].factor == 8.0 and spec.ropes[spec.layers[0].rope].theta == 1e4


def test_phi3_partial_rotation() -> None:
    spec = ModelSpec.from_config(config("phi3"))
    assert spec.fused_names and spec.ropes[0].rotary_dim == 8 and spec.head_dim == 16


def test_unused_keys_of_real_checkpoints_are_accepted() -> None:
    extra = {"_name_or_path": "x", "auto_map": {"AutoConfig": "code.Config"}, "torch_dtype": "bfloat16", "moe": None}
    assert ModelSpec.from_config(config("phi3") | extra) == ModelSpec.from_config(config("phi3"))


@pytest.mark.parametrize(
    ("family", "change", "flag"),
    [
        ("qwen2", {"model_type": "mamba"}, "model_type"),
        ("qwen2", {"model_type": None}, "model_type"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "architectures"),
        ("qwen2", {"text_config": {}}, "text_config"),
        ("qwen2", {"num_experts": 8, "router": "x"}, "num_experts"),
        ("qwen2", {"hidden_act": "relu"}, "hidden_act"),
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("qwen2", {"hidden_size": "wide"}, "model_type"),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["strange", "full_attention"]}, "model_type"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "model_type"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "short_mscale": 2}}, "rope_par"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_parameters.rope_theta"),
    ],
)
def test_refused(family: str, change: dict[str, Any], flag: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_config(config(family) | change)
    text = str(caught.value)
    assert caught.value.flag.startswith(flag) and all(name in text for name in FAMILIES)
    assert str(next(iter(change))) in text


def test_every_unknown_flag_is_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"\['mixture', 'residual_multiplier'\]"):
        ModelSpec.from_config(config() | {"residual_multiplier": 0.2, "mixture": 3, "harmless": False})


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
            "truncate": False,
            "original_max_position_embeddings": 512,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rotary_tables_equal_transformers(parameters: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = config("llama", hidden=512, rope_parameters=parameters)
    spec = ModelSpec.from_config(fields)
    table = cos_sin(spec.ropes[0], 2048, torch.device("cpu"))
    rotary = LlamaRotaryEmbedding(AutoConfig.for_model(**fields))
    cos, sin = rotary(torch.zeros(1), torch.arange(2048)[None])
    assert table.shape == (2048, 2, 64) and table.dtype == torch.float32
    torch.testing.assert_close(table[:, 0], cos[0, :, :64], rtol=0, atol=1e-4)
    torch.testing.assert_close(table[:, 1], sin[0, :, :64], rtol=0, atol=1e-4)
    torch.testing.assert_close(table[:64, 0], cos[0, :64, :64], rtol=0, atol=2e-6)


def test_table_of_position_zero_rotates_nothing() -> None:
    table = cos_sin(RopeSpec(kind="default", theta=1e4, rotary_dim=8, original_max_position=16), 3, torch.device("cpu"))
    assert torch.equal(table[0], torch.tensor([[1.0] * 4, [0.0] * 4]))
