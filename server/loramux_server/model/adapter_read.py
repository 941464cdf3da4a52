"""Reads a PEFT directory into slab order: every tensor cast to the dtype of serving, B transposed."""

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from loramux_base.adapter import TENSORS_NAME, AdapterFormatError, AdapterLayout
from loramux_base.safetensors_header import TensorInfo, read_header
from loramux_server.model.adapter_rows import RowsLayout

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_rows(directory: Path, adapter: AdapterLayout, layout: RowsLayout, memory: Tensor) -> None:
    """Fill memory with the rows of an adapter.

    The file is read, not mapped: one that gets shorter meanwhile is an error here and no signal.

    Args:
        directory: The PEFT directory.
        adapter: What is in it.
        layout: As `RowsLayout.of` gives it.
        memory: `[layout.nbytes]` uint8; every byte is written.

    Raises:
        AdapterFormatError: The file changed, or a number does not fit the dtype of serving.
        OSError: It cannot be read.
    """
    memory[: layout.nbytes].zero_()
    groups = layout.views(memory)
    path = directory / TENSORS_NAME
    tensors, data_start = read_header(path)
    by_name = {tensor.name: tensor for tensor in tensors}
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), data_start, 0, os.POSIX_FADV_WILLNEED)

        def read(name: str, shape: tuple[int, int]) -> Tensor:
            info = by_name.get(name)
            if info is None or info.shape != shape:
                raise AdapterFormatError(
                    "ADAPTER_INCOMPATIBLE", name, f"{TENSORS_NAME} changed while it was read; publish the adapter again"
                )
            return _cast(_read(file.fileno(), data_start, info), name, layout.dtype)

        for module in adapter.modules:
            name, index, columns = layout.places[module.module]
            group, rank = groups[name], module.rank
            a, b = group.a[module.layer, index, :rank], group.b[module.layer, :rank, columns]
            a.copy_(read(module.a_name, (rank, a.shape[1])))
            b.copy_(read(module.b_name, (b.shape[1], rank)).T)
            group.ranks[module.layer, index] = rank
            group.scales[module.layer, index] = module.scale


def _read(descriptor: int, data_start: int, info: TensorInfo) -> Tensor:
    buffer = bytearray(info.end - info.start)
    read_exactly(descriptor, memoryview(buffer), data_start + info.start)
    return torch.frombuffer(buffer, dtype=_DTYPES[info.dtype]).view(info.shape)


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a place in a file.

    Raises:
        OSError: It cannot be read, or ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file is shorter than it was")
        done += count


def _cast(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    # Both are NaN where any number is; a mask of every number takes twenty times as long.
    low, high = torch.aminmax(cast)
    if not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        raise AdapterFormatError(
            "ADAPTER_NUMERICS", name, f"tensor {name} holds a number that {dtype} cannot hold; scale it down"
        )
    return cast
