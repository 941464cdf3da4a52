"""Bounded reader of a safetensors header: nothing is mapped and no tensor data is read before the checks pass."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from loramux_base.adapter_error import incompatible, parse_json_object, shown

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 16384
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of the file.

    Attributes:
        name: Its key.
        dtype: `F32`, `F16` or `BF16`.
        shape: Two positive sizes.
        start: First byte, counted from the end of the header.
        end: One past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, int]
    start: int
    end: int


def read_header(path: Path) -> tuple[list[TensorInfo], int]:
    """Read and check the header.

    Checks: header size <= 1 MiB and inside the file, strict JSON, floating-point matrices only, offsets inside the
    file and equal to the size that shape and dtype give, tensors adjoin without overlap or hole to the file's end.

    Returns:
        The tensors ordered by offset, and the offset in the file at which the data begins.

    Raises:
        AdapterFormatError: The file breaks one of these rules.
    """
    name = path.name
    if path.is_symlink() or not path.is_file():
        raise incompatible(name, f"{name} is missing or not a regular file; an adapter directory must hold it")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise incompatible(name, f"{name} is truncated: it has no header")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise incompatible(name, f"{name} declares a header of more than {MAX_HEADER_BYTES} bytes")
        if 8 + length > size:
            raise incompatible(name, f"{name} is truncated: its header reaches past the end of the file")
        raw = file.read(length)
    if len(raw) != length:
        raise incompatible(name, f"{name} is truncated: its header could not be read")
    if not raw.startswith(b"{"):
        raise incompatible(name, f"{name} is not a safetensors file: its header does not begin with an object")
    entries = parse_json_object(raw, f"the header of {name}")
    _check_metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise incompatible(name, f"{name} holds {len(entries)} tensors; at most {MAX_TENSORS} are read")
    tensors = sorted((_tensor(key, entry) for key, entry in entries.items()), key=lambda tensor: tensor.start)
    expected = 0
    for tensor in tensors:
        if tensor.start != expected:
            word = "overlaps the one before it" if tensor.start < expected else "leaves a hole before it"
            raise incompatible(tensor.name, f"tensor {shown(tensor.name)} {word}; write the file again")
        expected = tensor.end
    if 8 + length + expected != size:
        word = "is truncated" if 8 + length + expected > size else "holds bytes that no tensor names"
        raise incompatible(name, f"{name} {word}: its tensors need {expected} bytes, it has {size - 8 - length}")
    return tensors, 8 + length


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise incompatible("__metadata__", "__metadata__ of the tensors file must map strings to strings")


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise incompatible(name, f"tensor {shown(name)} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise incompatible(name, f"tensor {shown(name)} has dtype {shown(dtype)}; take one of {', '.join(DTYPE_BYTES)}")
    if not _sizes(shape) or len(shape) != 2 or 0 in shape:
        raise incompatible(name, f"tensor {shown(name)} has shape {shown(shape)}; it must be a non-empty matrix")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != shape[0] * shape[1] * DTYPE_BYTES[dtype]:
        raise incompatible(name, f"tensor {shown(name)}: data_offsets do not span what dtype and shape need")
    return TensorInfo(name=name, dtype=dtype, shape=(shape[0], shape[1]), start=offsets[0], end=offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 48 for item in value
    )
