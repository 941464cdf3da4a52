"""Write an NF4 base: the decoder linears of a checkpoint quantized once, in transformers' pre-quantized layout.

The result is a complete model directory that this server, transformers and PEFT load to the same bytes. Embeddings,
output projection and norms keep the source's dtype. Tensors pass one by one; a shard of at most `SHARD_BYTES` is held
in memory. The directory appears under its name only when it is whole.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loramux_base import nf4
from loramux_base.checkpoint import ITEM_BYTES, Checkpoint, ModelLoadError
from loramux_base.fingerprint import CACHE_NAME
from loramux_base.nf4 import Nf4Error
from loramux_base.tensors import TensorReader
from loramux_server.model.names import linear_weights
from loramux_server.model.spec import ModelSpec

SHARD_BYTES = 1 << 30
"""Largest shard written, unless one tensor alone is larger."""

_COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")

Progress = Callable[[int, int, str], None]
"""Called with (tensors done, tensors, name of the last)."""


class QuantizeError(ValueError):
    """The destination cannot be written or the source is no dense checkpoint; the text says what to do."""


def quantize_checkpoint(
    src: str | Path, dst: str | Path, *, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Quantize the decoder linears of a checkpoint to NF4 (blocks of 64, no double quantization).

    Args:
        src: Dense checkpoint.
        dst: New directory; must not exist.
        progress: Called after each tensor.
        shard_bytes: Largest shard.

    Returns:
        `dst`.

    Raises:
        QuantizeError: `dst` exists, or the source is quantized already or has a width that 64 does not divide.
        ModelLoadError: Unreadable source.
        UnsupportedModel: A model that is not served.
    """
    target = Path(dst)
    if target.exists():
        raise QuantizeError(f"{target} exists; give a new directory or remove it first")
    if not target.parent.is_dir():
        raise QuantizeError(f"{target.parent} is no directory; create it first")
    checkpoint = Checkpoint(src)
    if checkpoint.config.get("quantization_config") is not None:
        raise QuantizeError(f"{checkpoint.directory} is quantized already; quantize the original checkpoint")
    spec = ModelSpec.from_config(checkpoint.config)
    linears = frozenset(linear_weights(spec))
    _check_linears(checkpoint, linears)
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        _write_weights(checkpoint, linears, partial, progress, shard_bytes)
        for file in sorted(checkpoint.directory.iterdir()):
            if file.is_file() and file.suffix in _COPIED_SUFFIXES and not _is_ours(file.name):
                shutil.copyfile(file, partial / file.name)
        config = {**checkpoint.config, "quantization_config": _quantization_config(_source_dtype(checkpoint, linears))}
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        if target.exists():
            raise QuantizeError(f"{target} was created meanwhile; give a new directory")
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return target


def _is_ours(name: str) -> bool:
    """Files that are written anew or say where the source's weights are."""
    return name in ("config.json", CACHE_NAME) or name.endswith(".index.json")


def _check_linears(checkpoint: Checkpoint, linears: frozenset[str]) -> None:
    for name in sorted(linears):
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ModelLoadError(checkpoint.directory, f"has no tensor {name}; it is not a whole checkpoint")
        if info.dtype not in ("F32", "BF16", "F16") or len(info.shape) != 2:
            raise QuantizeError(f"{name} is {info.dtype} {info.shape}; a dense floating-point matrix is needed")
        if info.shape[1] % nf4.BLOCK_SIZE:
            raise QuantizeError(
                f"{name} has input width {info.shape[1]}, no multiple of {nf4.BLOCK_SIZE}, so its NF4 blocks would "
                "cross rows; serve this model with --weights bf16"
            )


def _source_dtype(checkpoint: Checkpoint, linears: frozenset[str]) -> str:
    dtype = checkpoint.tensors[min(linears)].dtype
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]


def _quantization_config(compute_dtype: str) -> dict[str, Any]:
    """What transformers' `BitsAndBytesConfig` writes for these bytes."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _output_bytes(checkpoint: Checkpoint, linears: frozenset[str], name: str) -> int:
    info = checkpoint.tensors[name]
    if name in linears:
        return nf4.stored_bytes((info.shape[0], info.shape[1]))
    elements = 1
    for size in info.shape:
        elements *= size
    return elements * ITEM_BYTES[info.dtype]


def _plan_shards(checkpoint: Checkpoint, linears: frozenset[str], limit: int) -> list[list[str]]:
    """Names of source tensors by shard, in name order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(checkpoint.tensors):
        length = _output_bytes(checkpoint, linears, name)
        if shards[-1] and size + length > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += length
    return shards


def _write_weights(
    checkpoint: Checkpoint, linears: frozenset[str], directory: Path, progress: Progress | None, limit: int
) -> None:
    shards = _plan_shards(checkpoint, linears, limit)
    read = TensorReader(checkpoint)
    total, done = len(checkpoint.tensors), 0
    weight_map: dict[str, str] = {}
    size = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors.update(_convert(read, linears, name))
            done += 1
            if progress is not None:
                progress(done, total, name)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        _write_index(directory, weight_map, size)


def _convert(read: TensorReader, linears: frozenset[str], name: str) -> dict[str, Tensor]:
    tensor = read(name)
    if name not in linears:
        return {name: tensor}
    try:
        return nf4.to_tensors(name, nf4.quantize(tensor))
    except Nf4Error as error:
        raise QuantizeError(f"{name}: {error}") from error


def _write_index(directory: Path, weight_map: Mapping[str, str], size: int) -> None:
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
