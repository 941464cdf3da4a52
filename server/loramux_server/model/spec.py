"""What a checkpoint's `config.json` says about the computation, as flags; anything that we do not know is refused.

transformers' own configuration classes read the file, so that defaults and both layouts (`rope_parameters`; older
`rope_theta` and `rope_scaling`) mean here what they mean there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from loramux_server.model.rope import ROPE_KINDS, RopeSpec

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

FAMILIES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""`model_type` -> the architecture that a checkpoint of it must name."""

_GEMMA = frozenset({"gemma2", "gemma3_text"})

# Keys that the configuration classes do not declare and that say nothing about the forward pass, or that they read
# in another place (older layouts). Every other undeclared key with a value is refused.
_HARMLESS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "cache_implementation",
        "head_dim",
        "hidden_act",
        "is_llama_config",
        "model_type",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "quantization_config",
        "rope_local_base_freq",
        "rope_scaling",
        "rope_theta",
        "sliding_window_pattern",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
    }
)


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that the decoder layer does not compute."""

    def __init__(self, flag: str, message: str) -> None:
        """Build the text.

        Args:
            flag: Key of config.json at fault.
            message: What about it.
        """
        super().__init__(f"config.json: {flag}: {message}; families served: {', '.join(FAMILIES)}")
        self.flag = flag


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs between decoder layers.

    Attributes:
        window: Tokens a query sees, itself included; None = all before it.
        rope: Index into `ModelSpec.ropes`.
    """

    window: int | None
    rope: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Flags of the one decoder layer that serves every family.

    Attributes:
        family: `model_type` of the config.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head.
        max_position: Longest sequence the model was made for.
        rms_eps: Epsilon of every norm.
        norm_offset: Added to every norm weight: 1 for gemma, else 0.
        activation: Of the gated MLP.
        qkv_bias: q, k and v have a bias.
        output_bias: o has a bias.
        mlp_bias: gate, up and down have a bias.
        qk_norm: RMS norm over each head of q and k before the rotation.
        sandwich_norms: Norms also after attention and MLP, before the residual is added.
        fused_names: The checkpoint stores `qkv_proj` and `gate_up_proj` (phi3).
        attention_scale: Factor of q k^T.
        attention_softcap: Tanh cap of attention scores, or None.
        final_softcap: Tanh cap of the logits, or None.
        embedding_multiplier: Factor of the token embedding, rounded to the compute dtype before use.
        tied_embeddings: The output projection is the embedding.
        layers: One entry a decoder layer.
        ropes: Distinct rotary settings.
        config: The `config.json` it came from, without its quantization.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_eps: float
    norm_offset: float
    activation: Activation
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sandwich_norms: bool
    fused_names: bool
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    embedding_multiplier: float
    tied_embeddings: bool
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    config: Mapping[str, Any] = dataclasses.field(repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Read the flags.

        Args:
            config: Parsed config.json.

        Raises:
            UnsupportedModel: Family, architecture or flag that is not served; the text names it.
        """
        parsed = parse_config(config)
        family = str(parsed.model_type)
        gemma = family in _GEMMA
        heads = int(parsed.num_attention_heads)
        kv_heads = int(parsed.num_key_value_heads or heads)
        head_dim = int(getattr(parsed, "head_dim", None) or parsed.hidden_size // heads)
        if heads % kv_heads:
            raise UnsupportedModel("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
        activation = str(parsed.hidden_activation if gemma else parsed.hidden_act)
        if activation not in _ACTIVATIONS:
            raise UnsupportedModel(
                "hidden_activation" if gemma else "hidden_act", f"{activation!r} is none of {sorted(_ACTIVATIONS)}"
            )
        bias = bool(getattr(parsed, "attention_bias", False)) and family not in ("mistral", "phi3")
        layers, ropes = _layers(parsed, head_dim)
        scale = float(parsed.query_pre_attn_scalar) if gemma else float(head_dim)
        return cls(
            family=family,
            vocab_size=int(parsed.vocab_size),
            hidden_size=int(parsed.hidden_size),
            intermediate_size=int(parsed.intermediate_size),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=int(parsed.max_position_embeddings),
            rms_eps=float(parsed.rms_norm_eps),
            norm_offset=1.0 if gemma else 0.0,
            activation=_ACTIVATIONS[activation],
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=family == "llama" and bool(parsed.mlp_bias),
            qk_norm=family in ("qwen3", "gemma3_text"),
            sandwich_norms=gemma,
            fused_names=family == "phi3",
            attention_scale=scale**-0.5,
            attention_softcap=getattr(parsed, "attn_logit_softcapping", None) if family == "gemma2" else None,
            final_softcap=getattr(parsed, "final_logit_softcapping", None) if gemma else None,
            embedding_multiplier=float(parsed.hidden_size) ** 0.5 if gemma else 1.0,
            tied_embeddings=bool(parsed.tie_word_embeddings),
            layers=layers,
            ropes=ropes,
            config={key: value for key, value in config.items() if key != "quantization_config"},
        )


def parse_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration object of a served family.

    Raises:
        UnsupportedModel: Unknown family, architecture or key, or a value that transformers itself refuses.
    """
    family = config.get("model_type")
    if isinstance(config.get("text_config"), Mapping):
        raise UnsupportedModel(
            "text_config", f"{family!r} is a model of several modalities; save its language model as a checkpoint"
        )
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModel("model_type", f"{family!r} is not served")
    architectures = config.get("architectures") or [FAMILIES[family]]
    if FAMILIES[family] not in architectures:
        raise UnsupportedModel("architectures", f"{architectures} where {FAMILIES[family]} is needed")
    kind = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(kind)} | _HARMLESS
    unknown = sorted(
        key for key, value in config.items() if key not in known and not key.startswith("_") and value not in _NEUTRAL
    )
    if unknown:
        raise UnsupportedModel(
            unknown[0], f"unknown flags {unknown}; if they do not change the forward pass, remove them from the file"
        )
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention", "only causal attention is served")
    fields = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    try:
        return kind(**fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:  # of its validation, its rope reading
        raise UnsupportedModel("model_type", f"transformers refuses this {family} config ({error})") from error


_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})


def _layers(parsed: PretrainedConfig, head_dim: int) -> tuple[tuple[LayerSpec, ...], tuple[RopeSpec, ...]]:
    count = int(parsed.num_hidden_layers)
    window = getattr(parsed, "sliding_window", None)
    types = getattr(parsed, "layer_types", None)
    if types is None or parsed.model_type in ("llama", "mistral", "phi3"):
        types = ["sliding_attention" if window else "full_attention"] * count
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != count:
        raise UnsupportedModel("layer_types", f"{unknown or len(types)} for {count} layers is not served")
    if "sliding_attention" in types and not (isinstance(window, int) and window > 0):
        raise UnsupportedModel("sliding_window", f"{window!r}, but layer_types has sliding attention")
    parameters: Mapping[str, Any] = parsed.rope_parameters or {}
    ropes: list[RopeSpec] = []
    layers: list[LayerSpec] = []
    for kind in types:
        nested = parameters.get(kind)
        rope = _rope(nested if isinstance(nested, Mapping) else parameters, head_dim, parsed)
        if rope not in ropes:
            ropes.append(rope)
        layers.append(LayerSpec(window=window if kind == "sliding_attention" else None, rope=ropes.index(rope)))
    return tuple(layers), tuple(ropes)


def _rope(parameters: Mapping[str, Any], head_dim: int, parsed: PretrainedConfig) -> RopeSpec:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(
            "rope_parameters.rope_type", f"{kind!r} is none of {', '.join(ROPE_KINDS)} (others depend on the length)"
        )
    known = {field.name for field in dataclasses.fields(RopeSpec)} | {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    }
    unknown = sorted(key for key, value in parameters.items() if key not in known and value not in _NEUTRAL)
    if unknown:
        raise UnsupportedModel("rope_parameters", f"unknown keys {unknown}")
    theta = parameters.get("rope_theta")
    if not isinstance(theta, int | float) or theta <= 0:
        raise UnsupportedModel("rope_parameters.rope_theta", f"{theta!r} is not a positive number")
    partial = parameters.get("partial_rotary_factor", 1.0) if parsed.model_type == "phi3" or kind != "default" else 1.0
    optional = {
        name: parameters[name]
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
        if parameters.get(name) is not None
    }
    rotary_dim = int(head_dim * partial)
    if rotary_dim <= 0 or rotary_dim % 2:
        raise UnsupportedModel("rope_parameters.partial_rotary_factor", f"rotates {rotary_dim} of {head_dim}")
    return RopeSpec(
        kind=kind,
        theta=float(theta),
        rotary_dim=rotary_dim,
        original_max_position=int(parameters.get("original_max_position_embeddings") or parsed.max_position_embeddings),
        truncate=bool(parameters.get("truncate", True)),
        **{name: float(value) for name, value in optional.items()},
    )
