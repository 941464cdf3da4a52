"""PEFT adapter directories written by hand, for a tiny llama: no torch, every byte chosen by the test."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loramux_base.shapes import BaseShapes, base_shapes

TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}

Tensors = dict[str, tuple[str, list[int], bytes]]


def tiny_base(**changes: Any) -> BaseShapes:
    return base_shapes({**TINY_CONFIG, **changes})


def write_base(directory: Path, **changes: Any) -> Path:
    """Write the base's `config.json`; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps({**TINY_CONFIG, **changes}))
    return path


def tensor_name(layer: int, module: str, side: str) -> str:
    parent = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"base_model.model.model.layers.{layer}.{parent}.{module}.lora_{side}.weight"


def tensors_of(
    base: BaseShapes,
    *,
    rank: int = 4,
    layers: Iterable[int] | None = None,
    modules: Iterable[str] | None = None,
    value: float = 0.5,
) -> Tensors:
    """A and B of every chosen module, fp32, every element `value`."""
    names = list(base.modules if modules is None else modules)
    made: Tensors = {}
    for layer in range(base.num_layers) if layers is None else layers:
        for module in names:
            inputs, outputs = base.modules[module]
            for side, shape in (("A", [rank, inputs]), ("B", [outputs, rank])):
                data = struct.pack("<f", value) * (shape[0] * shape[1])
                made[tensor_name(layer, module, side)] = ("F32", shape, data)
    return made


def header_of(tensors: Tensors) -> dict[str, Any]:
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return header


def safetensors_bytes(tensors: Tensors, header: Mapping[str, Any] | bytes | None = None) -> bytes:
    """A safetensors file; `header` replaces the right one."""
    if header is None:
        header = header_of(tensors)
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, _, data in tensors.values())


def write_adapter(
    directory: Path, tensors: Tensors, *, manifest: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """Write an adapter directory; `config` overrides keys of adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    if manifest is not None:
        (directory / "loramux_manifest.json").write_text(json.dumps(manifest))
    return directory
