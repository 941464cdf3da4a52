"""A model directory on disk: its config and the tensors of its safetensors files. Imports no torch.

Only safetensors are read, never a pickle, and no code from the directory is ever run. Format of a file: 8 bytes
little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the bytes of all tensors.
Source: https://huggingface.co/docs/safetensors/index#format
"""

import dataclasses
import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""Bound of a safetensors header, the same that the safetensors library has."""

ITEM_BYTES = MappingProxyType(
    {
        "F64": 8,
        "I64": 8,
        "U64": 8,
        "F32": 4,
        "I32": 4,
        "U32": 4,
        "F16": 2,
        "BF16": 2,
        "I16": 2,
        "U16": 2,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
    }
)
"""Bytes an element of each safetensors dtype that a checkpoint may hold."""


class ModelLoadError(ValueError):
    """A model directory that cannot be used; the message names the file and the way out.

    Attributes:
        path: The file or directory at fault.
    """

    def __init__(self, path: str | Path, message: str) -> None:
        """Build the text `path: message`."""
        super().__init__(f"{path}: {message}")
        self.path = Path(path)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: As in the file.
        dtype: safetensors name, `BF16`, `F32`, `U8`, ...
        shape: Sizes.
        file: The safetensors file.
        offset: First byte, counted from the start of the file.
        nbytes: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, in the order of their bytes; checks that the file is whole.

    Args:
        file: The safetensors file.

    Raises:
        ModelLoadError: Missing, truncated, too long a header, or offsets that do not fit.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
            if length is None or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelLoadError(file, f"not a whole safetensors file ({size} bytes); copy or download it again")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise ModelLoadError(file, "missing; copy or download the checkpoint again") from error
    except (OSError, ValueError, RecursionError) as error:  # the last: nested without end
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(file, f"unreadable safetensors header ({error}); download it again") from error
    start = 8 + length
    tensors: list[TensorInfo] = []
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(value) for value in entry["data_offsets"])
            shape = tuple(int(value) for value in entry["shape"])
            info = TensorInfo(
                name=name, dtype=entry["dtype"], shape=shape, file=file, offset=start + begin, nbytes=end - begin
            )
            _check_entry(info)
            tensors.append(info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelLoadError):
            raise
        raise ModelLoadError(file, f"malformed safetensors header ({error!r}); download it again") from error
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    position = start
    for info in tensors:
        if info.offset != position:
            raise ModelLoadError(file, f"tensor {info.name} overlaps or leaves a gap; download it again")
        position += info.nbytes
    if position != size:
        raise ModelLoadError(
            file, f"has {size} bytes where its header promises {position}: truncated; copy or download it again"
        )
    return {info.name: info for info in tensors}


def _check_entry(info: TensorInfo) -> None:
    if info.dtype not in ITEM_BYTES:
        raise ModelLoadError(info.file, f"tensor {info.name} has dtype {info.dtype}; use one of {sorted(ITEM_BYTES)}")
    elements = 1
    for size in info.shape:
        elements *= size
    if min(info.shape, default=0) < 0 or elements * ITEM_BYTES[info.dtype] != info.nbytes:
        raise ModelLoadError(info.file, f"tensor {info.name}: shape {info.shape} does not fit its {info.nbytes} bytes")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the directory.

    Raises:
        ModelLoadError: Missing or not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(file, "missing; the model directory must hold the whole checkpoint") from error
    except RecursionError as error:
        raise ModelLoadError(file, "unreadable (nested too deeply); download it again") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(file, f"unreadable ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(file, f"expected a JSON object, got {type(value).__name__}; download it again")
    return value


class Checkpoint:
    """An opened model directory: config and headers; `loramux_base.tensors` reads the data.

    Attributes:
        directory: Of the checkpoint.
        config: Parsed `config.json`.
        tensors: All tensors of all shards by name.
        files: The safetensors files.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read config and all headers.

        Args:
            directory: With config.json and model.safetensors, or model.safetensors.index.json and its shards.

        Raises:
            ModelLoadError: The directory, its config or a file is missing, pickled, malformed or truncated.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ModelLoadError(self.directory, "no such directory; give the path of a downloaded checkpoint")
        self.config = read_json(self.directory / "config.json")
        self.files = self._find_files()
        tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, info in read_header(file).items():
                if name in tensors:
                    raise ModelLoadError(file, f"tensor {name} is also in {tensors[name].file.name}; remove one file")
                tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._check_index()

    @functools.cached_property
    def _index(self) -> dict[str, str] | None:
        file = self.directory / "model.safetensors.index.json"
        if (self.directory / "model.safetensors").exists() or not file.exists():
            return None
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
            raise ModelLoadError(file, "has no weight_map; download it again")
        if any(Path(value).name != value for value in weight_map.values()):
            raise ModelLoadError(file, "names a shard outside the directory; shards must lie beside the index")
        return weight_map

    def _find_files(self) -> tuple[Path, ...]:
        if self._index is not None:
            return tuple(self.directory / name for name in sorted(set(self._index.values())))
        single = self.directory / "model.safetensors"
        if single.exists():
            return (single,)
        pickles = sorted(self.directory.glob("*.bin")) + sorted(self.directory.glob("*.pt*"))
        if pickles:
            raise ModelLoadError(
                pickles[0],
                "a pickled checkpoint runs code when it is read, so it is refused; convert it with "
                "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)`",
            )
        raise ModelLoadError(single, "missing, and there is no model.safetensors.index.json; download the weights")

    def _check_index(self) -> None:
        for name, file in (self._index or {}).items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ModelLoadError(self.directory / file, f"lacks tensor {name} of the index; download it again")

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has the tensor."""
        return name in self.tensors
