"""Strict reader of PEFT LoRA directories: `adapter_config.json` and `adapter_model.safetensors`. Imports no torch.

`read_layout` looks at names, shapes and numbers only; whether the tensors are finite is for the validation worker.
"""

import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from loramux_base.adapter_config import AdapterConfig
from loramux_base.adapter_error import AdapterFormatError, incompatible, read_bounded, shown
from loramux_base.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, AdapterManifest
from loramux_base.safetensors_header import TensorInfo, read_header
from loramux_base.shapes import LINEAR_GROUPS, MODULE_PARENTS, BaseShapes, base_shapes

__all__ = [
    "CONFIG_NAME",
    "LINEAR_GROUPS",
    "MANIFEST_NAME",
    "TENSORS_NAME",
    "AdapterConfig",
    "AdapterFormatError",
    "AdapterLayout",
    "AdapterManifest",
    "BaseShapes",
    "ModuleWeights",
    "base_shapes",
    "read_config",
    "read_layout",
    "read_manifest",
    "version_digest",
]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
RANK_UNIT = 16
MAX_CONFIG_BYTES = 1 << 20
_MAX_ENTRIES = 64
_CODE = frozenset({".py", ".pyc", ".so", ".sh", ".jinja", ".jinja2"})
_PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".nemo", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".zip"})
_PREFIX = "base_model.model."
_MODULE = re.compile(
    r"(?P<path>(?:model|model\.language_model|language_model\.model)\.layers\.(?P<layer>0|[1-9][0-9]{0,4})"
    r"\.(?P<parent>[a-z_]+)\.(?P<module>[a-z_]+))\.(?P<side>lora_[AB])\.weight",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleWeights:
    """The two matrices of one adapted linear layer.

    Attributes:
        layer: Decoder layer.
        module: `q_proj`, ..., `down_proj`.
        rank: Rows of A and columns of B.
        scale: Factor on `B @ A`.
        a_name: Tensor `[rank, in_features]`.
        b_name: Tensor `[out_features, rank]`.
    """

    layer: int
    module: str
    rank: int
    scale: float
    a_name: str
    b_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """A checked adapter.

    Attributes:
        config: Its configuration.
        modules: Its adapted layers, by layer and module.
        max_rank: Largest rank of a module.
        rank_units: Units of 16 rank rows that it takes in a slab.
        tensor_bytes: Bytes of all tensors.
    """

    config: AdapterConfig
    modules: tuple[ModuleWeights, ...]
    max_rank: int
    rank_units: int
    tensor_bytes: int


def read_config(directory: Path) -> AdapterConfig:
    """Read `adapter_config.json` alone.

    Raises:
        AdapterFormatError: As in `AdapterConfig.from_json`.
    """
    return AdapterConfig.from_json(read_bounded(directory / CONFIG_NAME, MAX_CONFIG_BYTES))


def read_manifest(directory: Path) -> AdapterManifest | None:
    """Read the manifest; None if the directory has none.

    Raises:
        AdapterFormatError: As in `AdapterManifest.from_json`.
    """
    path = directory / MANIFEST_NAME
    if not os.path.lexists(path):
        return None
    return AdapterManifest.from_json(read_bounded(path, MAX_MANIFEST_BYTES))


def read_layout(directory: Path, base: BaseShapes, *, max_rank: int) -> AdapterLayout:
    """Check an adapter directory against a base model; no tensor data is read.

    Args:
        directory: The PEFT directory.
        base: Shapes of the base's linear layers.
        max_rank: Largest rank taken.

    Raises:
        AdapterFormatError: With reason, field and the way out.
    """
    _check_files(directory)
    config = read_config(directory)
    if config.r > max_rank:
        raise _rank_over("r", config.r, max_rank)
    tensors, _ = read_header(directory / TENSORS_NAME)
    if not tensors:
        raise incompatible(TENSORS_NAME, f"{TENSORS_NAME} holds no tensors")
    pairs: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    paths: dict[tuple[int, str], str] = {}
    for tensor in tensors:
        path, layer, module, side = _parse_name(tensor.name, base)
        if paths.setdefault((layer, module), path) != path:
            raise incompatible(tensor.name, f"{module} of layer {layer} is there under two names; keep one")
        pairs.setdefault((layer, module), {})[side] = tensor
    order = {name: index for index, name in enumerate(MODULE_PARENTS)}
    modules = tuple(
        _module_weights(key, paths[key], pairs[key], config, base, max_rank)
        for key in sorted(pairs, key=lambda key: (key[0], order[key[1]]))
    )
    largest = max(module.rank for module in modules)
    return AdapterLayout(
        config=config,
        modules=modules,
        max_rank=largest,
        rank_units=-(-largest // RANK_UNIT),
        tensor_bytes=tensors[-1].end,
    )


def version_digest(directory: Path) -> str:
    """Digest that identifies an adapter version.

    SHA-256 over the length-prefixed, sorted list of (file name, size, SHA-256) of the canonical configuration, the
    tensors and the manifest (if there is one). Sizes and lengths are 8 bytes, little-endian. Notes, dropout and key
    order in `adapter_config.json` change nothing; alpha does.

    Returns:
        64 hex digits.

    Raises:
        AdapterFormatError: The configuration cannot be read, or a file is missing.
    """
    canonical = read_config(directory).canonical()
    entries = {CONFIG_NAME: (len(canonical), hashlib.sha256(canonical).digest())}
    for name, required in ((TENSORS_NAME, True), (MANIFEST_NAME, False)):
        path = directory / name
        if required or os.path.lexists(path):
            if path.is_symlink() or not path.is_file():
                raise incompatible(name, f"{name} is missing or not a regular file; an adapter directory must hold it")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                entries[name] = (file.tell(), digest)
    return _combine((name, *entry) for name, entry in entries.items())


def _combine(entries: Iterable[tuple[str, int, bytes]]) -> str:
    total = hashlib.sha256()
    for name, size, digest in sorted(entries):
        encoded = name.encode()
        total.update(len(encoded).to_bytes(8, "little") + encoded + size.to_bytes(8, "little"))
        total.update(len(digest).to_bytes(8, "little") + digest)
    return total.hexdigest()


def _check_files(directory: Path) -> None:
    if directory.is_symlink() or not directory.is_dir():
        raise incompatible("directory", "the adapter is not a directory")
    with os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            name = entry.name
            if count >= _MAX_ENTRIES:
                raise incompatible("directory", f"the adapter directory holds more than {_MAX_ENTRIES} entries")
            try:
                mode = entry.stat(follow_symlinks=False).st_mode
            except FileNotFoundError:
                # A server renames what it has written beside the adapter.
                continue
            if not stat.S_ISREG(mode):
                raise incompatible(name, f"{shown(name)} is a link or a directory; keep regular files only")
            suffix = Path(name).suffix.lower()
            if suffix in _PICKLES:
                raise incompatible(
                    name, f"{shown(name)} may hold a pickle, which is never read; save safetensors and remove it"
                )
            if suffix in _CODE or name == "chat_template.json":
                raise incompatible(
                    name, f"{shown(name)}: code and templates come with the base only; remove it from the adapter"
                )
            if suffix == ".safetensors" and name != TENSORS_NAME:
                raise incompatible(
                    name, f"{shown(name)} is not read; save one {TENSORS_NAME} without embeddings or shards"
                )


def _parse_name(name: str, base: BaseShapes) -> tuple[str, int, str, str]:
    """Module path, layer, module and `lora_A` or `lora_B` of a tensor's name."""
    if not name.startswith(_PREFIX):
        raise incompatible(name, f"unknown tensor {shown(name)}; PEFT names begin with {_PREFIX}")
    inner = name[len(_PREFIX) :]
    if "lora_magnitude_vector" in inner:
        raise incompatible(name, f"{shown(name)} belongs to DoRA, which is not served; train with use_dora=False")
    if "lora_embedding_" in inner or "embed_tokens" in inner or inner.startswith("lm_head"):
        raise incompatible(
            name, f"{shown(name)}: embeddings and lm_head take no adapter; target the linear layers of the blocks"
        )
    if "modules_to_save" in inner:
        raise incompatible(name, f"{shown(name)} is a fully trained module; train with modules_to_save=None")
    if inner.endswith(".bias"):
        raise incompatible(name, f"{shown(name)} is a bias; train with bias='none' and lora_bias=False")
    match = _MODULE.fullmatch(inner)
    if match is None or MODULE_PARENTS.get(match["module"]) != match["parent"]:
        raise incompatible(name, f"unknown tensor {shown(name)}; adapters may target {', '.join(MODULE_PARENTS)}")
    layer = int(match["layer"])
    if layer >= base.num_layers:
        raise incompatible(name, f"{shown(name)}: the base has {base.num_layers} layers, numbered from 0")
    if match["module"] not in base.modules:
        raise incompatible(name, f"{shown(name)}: the base has no {match['module']}")
    return match["path"], layer, match["module"], match["side"]


def _module_weights(
    key: tuple[int, str],
    path: str,
    pair: dict[str, TensorInfo],
    config: AdapterConfig,
    base: BaseShapes,
    max_rank: int,
) -> ModuleWeights:
    layer, module = key
    if len(pair) != 2:
        there = next(iter(pair.values())).name
        missing = "lora_B" if "lora_A" in pair else "lora_A"
        raise incompatible(there, f"{shown(there)} has no {missing} beside it; save the adapter again")
    a, b = pair["lora_A"], pair["lora_B"]
    if not config.targets(path, layer):
        raise incompatible(
            a.name,
            f"{shown(a.name)} is there, but target_modules, exclude_modules or layers_to_transform leave it out; "
            "save the adapter again",
        )
    rank = config.rank_of(path)
    if rank > max_rank:
        raise _rank_over("rank_pattern", rank, max_rank)
    inputs, outputs = base.modules[module]
    for tensor, wanted in ((a, (rank, inputs)), (b, (outputs, rank))):
        if tensor.shape != wanted:
            raise incompatible(
                tensor.name,
                f"{shown(tensor.name)} has shape {list(tensor.shape)}; configuration and base give {list(wanted)}",
            )
    return ModuleWeights(
        layer=layer, module=module, rank=rank, scale=config.scale_of(path), a_name=a.name, b_name=b.name
    )


def _rank_over(field: str, rank: int, max_rank: int) -> AdapterFormatError:
    return incompatible(
        field, f"{field}: rank {rank} is over this server's limit of {max_rank}; train with a lower rank"
    )
