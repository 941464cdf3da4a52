"""Shapes of the linear layers that adapters may target, from a base model's `config.json`. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any

LINEAR_GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Fused linear group -> its modules in the order of their columns."""

MODULE_PARENTS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
"""Module -> its parent block inside a decoder layer."""

_FUSED = frozenset({"phi3", "phi3small", "phi4_multimodal"})
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class UnsupportedBase(ValueError):
    """The base model's configuration gives no linear layers that adapters could target."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseShapes:
    """Linear layers of a base model; every decoder layer has the same.

    Attributes:
        num_layers: Number of decoder layers.
        modules: Module name (`q_proj`) -> (in_features, out_features).
    """

    num_layers: int
    modules: Mapping[str, tuple[int, int]]


def base_shapes(config: Mapping[str, Any]) -> BaseShapes:
    """Read the shapes from a parsed `config.json`.

    Args:
        config: The configuration; a nested `text_config` is used where there is one.

    Raises:
        UnsupportedBase: A size is missing or no positive integer, or the architecture fuses or routes its linears.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = text
    kind = config.get("model_type")
    if kind in _FUSED:
        raise UnsupportedBase(
            f"model_type {kind!r} has fused qkv_proj and gate_up_proj layers, for which adapters are not served yet; "
            "serve it without adapters or use a base with separate projections"
        )
    experts = [key for key in _EXPERT_KEYS if config.get(key)]
    if experts:
        raise UnsupportedBase(f"a mixture of experts ({experts[0]}) takes no adapters yet; use a dense base model")
    hidden = _size(config, "hidden_size")
    inner = _size(config, "intermediate_size")
    heads = _size(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        head_dim = _size(config, "head_dim")
    elif hidden % heads == 0:
        head_dim = hidden // heads
    else:
        raise UnsupportedBase("hidden_size is no multiple of num_attention_heads and head_dim is missing")
    return BaseShapes(
        num_layers=_size(config, "num_hidden_layers"),
        modules={
            "q_proj": (hidden, heads * head_dim),
            "k_proj": (hidden, kv_heads * head_dim),
            "v_proj": (hidden, kv_heads * head_dim),
            "o_proj": (heads * head_dim, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        },
    )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnsupportedBase(f"config.json: {key} must be a positive integer")
    return value
