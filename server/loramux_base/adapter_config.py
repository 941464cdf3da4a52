"""`adapter_config.json` of a PEFT LoRA adapter: what is read, what is refused. Imports no torch."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from loramux_base.adapter_error import incompatible, parse_json_object, shown
from loramux_base.adapter_pattern import Patterns

_Pairs = tuple[tuple[str, Any], ...]

# Keys that describe training, provenance or initialisation and change nothing in a trained adapter's forward pass.
_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)

# Key -> what to do when it is set: these change the forward pass in a way that is not served.
_UNSUPPORTED: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA is not served; train with plain LoRA",
    "arrow_config": "Arrow routing is not served; train with plain LoRA",
    "fan_in_fan_out": "transposed base weights are not served; use a base with Linear layers",
    "kasa_config": "KaSA is not served; train with plain LoRA",
    "layer_replication": "replicated layers are not served; train on the base's own layers",
    "lora_bias": "a bias on lora_B is not served; train with lora_bias=False",
    "megatron_config": "Megatron-sharded adapters are not served; save an unsharded adapter",
    "modules_to_save": "fully trained modules are not served; train with modules_to_save=None",
    "monteclora_config": "MonteCLoRA is not served; train with plain LoRA",
    "target_parameters": "adapters on bare parameters are not served; target Linear layers with target_modules",
    "trainable_token_indices": "trained token embeddings are not served; train without them",
    "use_bdlora": "block-diagonal LoRA is not served; train with plain LoRA",
    "use_dora": "DoRA is not served; train with use_dora=False",
    "use_qalora": "QALoRA is not served; train with plain LoRA",
}

# These initialisations leave the base's weights alone; the others subtract something from them, so that the saved
# matrices are only right on that changed base.
_NEUTRAL_INIT = ("gaussian", "eva", "orthogonal")
_KNOWN = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
_MAX_PATTERNS = 4096
_MAX_RANK = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields of a PEFT LoRA configuration that decide its forward pass.

    Attributes:
        r: Rank where no pattern matches.
        lora_alpha: Alpha where no pattern matches.
        use_rslora: Scale is `alpha / sqrt(r)` instead of `alpha / r`.
        rank_pattern: Pattern -> rank; the first pattern that matches a module counts, as in PEFT.
        alpha_pattern: Pattern -> alpha, likewise.
        layers: Layers that the adapter was trained on; None = all.
        target_modules: Suffixes of the targeted modules; None when PEFT was given a regular expression.
        exclude_modules: Suffixes of the excluded modules.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Patterns = dataclasses.field(default_factory=Patterns)
    alpha_pattern: Patterns = dataclasses.field(default_factory=Patterns)
    layers: frozenset[int] | None = None
    target_modules: frozenset[str] | None = None
    exclude_modules: frozenset[str] = frozenset()

    @classmethod
    def from_json(cls, data: bytes) -> "AdapterConfig":
        """Parse the file; see the module's tables for what is refused.

        Raises:
            AdapterFormatError: With the key as `field`.
        """
        raw = parse_json_object(data, "adapter_config.json")
        if raw.get("peft_type") != "LORA":
            raise incompatible(
                "peft_type", f"peft_type is {shown(raw.get('peft_type'))}; only LORA adapters are served"
            )
        if raw.get("bias", "none") != "none":
            raise incompatible("bias", f"bias is {shown(raw['bias'])}; trained biases are not served, use bias='none'")
        for key, way_out in _UNSUPPORTED.items():
            if not _neutral(raw.get(key)):
                raise incompatible(key, f"{key} is set: {way_out}")
        _check_init(raw.get("init_lora_weights", True))
        for key, value in raw.items():
            if key not in _KNOWN and key not in _UNSUPPORTED and key not in _IGNORED and not _neutral(value):
                raise incompatible(key, f"unknown setting {shown(key)}; remove it or set it to null")
        use_rslora = raw.get("use_rslora", False)
        if not isinstance(use_rslora, bool):
            raise incompatible("use_rslora", f"use_rslora is {shown(use_rslora)}; it must be true or false")
        targets = raw.get("target_modules")
        return cls(
            r=_rank("r", raw.get("r", 8)),
            lora_alpha=_alpha("lora_alpha", raw.get("lora_alpha", 8)),
            use_rslora=use_rslora,
            rank_pattern=_patterns("rank_pattern", raw.get("rank_pattern"), _rank),
            alpha_pattern=_patterns("alpha_pattern", raw.get("alpha_pattern"), _alpha),
            layers=_layers(raw.get("layers_to_transform"), raw.get("layers_pattern")),
            target_modules=None if targets is None or isinstance(targets, str) else _names("target_modules", targets),
            exclude_modules=_excluded(raw.get("exclude_modules")),
        )

    def rank_of(self, module_path: str) -> int:
        """Rank that PEFT gives the module, e.g. `model.layers.0.self_attn.q_proj`."""
        value = self.rank_pattern.find(module_path)
        return self.r if value is None else int(value)

    def scale_of(self, module_path: str) -> float:
        """Factor that PEFT puts on the module's product."""
        value = self.alpha_pattern.find(module_path)
        alpha = self.lora_alpha if value is None else float(value)
        rank = self.rank_of(module_path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module_path: str, layer: int) -> bool:
        """Whether the configuration, where it lists modules and layers, covers this module."""
        if self.layers is not None and layer not in self.layers:
            return False
        if _has_suffix(self.exclude_modules, module_path):
            return False
        return self.target_modules is None or _has_suffix(self.target_modules, module_path)

    def canonical(self) -> bytes:
        """Canonical JSON of what decides the forward pass: equal for files that differ only in notes or key order."""
        return json.dumps(
            {
                "alpha_pattern": [[key, float(value)] for key, value in self.alpha_pattern.items],
                "layers_to_transform": None if self.layers is None else sorted(self.layers),
                "lora_alpha": self.lora_alpha,
                "peft_type": "LORA",
                "r": self.r,
                "rank_pattern": [[key, int(value)] for key, value in self.rank_pattern.items],
                "use_rslora": self.use_rslora,
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode()


def _neutral(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _check_init(value: Any) -> None:
    if isinstance(value, bool) or value is None or value in _NEUTRAL_INIT:
        return
    raise incompatible(
        "init_lora_weights",
        f"init_lora_weights is {shown(value)}, which changes the base's weights; save the adapter converted to plain "
        "LoRA (path_initial_model_for_weight_conversion)",
    )


def _rank(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_RANK:
        raise incompatible(field, f"{field}: rank {shown(value)} must be a positive integer")
    return value


def _alpha(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 3.0e38:
        raise incompatible(field, f"{field}: alpha {shown(value)} must be a finite number")
    return float(value)


def _patterns(field: str, value: Any, check: Any) -> Patterns:
    if value is None:
        return Patterns()
    if not isinstance(value, dict):
        raise incompatible(field, f"{field} must map module patterns to numbers")
    if len(value) > _MAX_PATTERNS:
        raise incompatible(field, f"{field} has {len(value)} patterns; at most {_MAX_PATTERNS} are read")
    return Patterns(field, tuple((key, check(field, item)) for key, item in value.items()))


def _layers(value: Any, pattern: Any) -> frozenset[int] | None:
    listed = [value] if isinstance(value, int) else value
    if listed is None or listed == []:
        return None
    if not isinstance(listed, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 16 for item in listed
    ):
        raise incompatible(
            "layers_to_transform", f"layers_to_transform is {shown(value)}; it must list layer numbers from 0"
        )
    if not _neutral(pattern) and pattern != "layers" and not (isinstance(pattern, list) and "layers" in pattern):
        raise incompatible("layers_pattern", f"layers_pattern is {shown(pattern)}; the base's layers are in 'layers'")
    return frozenset(listed)


def _names(field: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or len(value) > _MAX_PATTERNS or not all(isinstance(item, str) for item in value):
        raise incompatible(field, f"{field} must be a list of module names or one regular expression")
    return frozenset(value)


def _excluded(value: Any) -> frozenset[str]:
    # A regular expression is not evaluated: which modules it left out shows in the tensors.
    return frozenset() if _neutral(value) or isinstance(value, str) else _names("exclude_modules", value)


def _has_suffix(names: frozenset[str], path: str) -> bool:
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))
