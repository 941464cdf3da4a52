"""Numbers that the dtype of serving cannot hold are refused, wherever they stand."""

import math
import struct
from pathlib import Path

import pytest
import torch

from loramux_base.adapter import AdapterFormatError, read_layout
from loramux_server.model.adapter_read import read_rows
from loramux_server.model.adapter_rows import RowsLayout
from tests.support.adapters import tensor_name, tensors_of, tiny_base, write_adapter

BASE = tiny_base()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
@pytest.mark.parametrize("place", [0, 1, 63, 127])
@pytest.mark.parametrize("side", ["A", "B"])
def test_one_bad_number_is_enough(tmp_path: Path, dtype: torch.dtype, number: float, place: int, side: str) -> None:
    tensors = tensors_of(BASE, modules=["o_proj"], value=-0.5)
    name = tensor_name(1, "o_proj", side)
    kind, shape, data = tensors[name]
    tensors[name] = (kind, shape, data[: 4 * place] + struct.pack("<f", number) + data[4 * place + 4 :])
    directory = write_adapter(tmp_path / "a", tensors)
    adapter = read_layout(directory, BASE, max_rank=16)
    layout = RowsLayout.of(BASE, adapter, dtype=dtype)
    memory = torch.empty(layout.nbytes, dtype=torch.uint8)
    if dtype == torch.float32 and math.isfinite(number):
        read_rows(directory, adapter, layout, memory)
        return
    with pytest.raises(AdapterFormatError) as caught:
        read_rows(directory, adapter, layout, memory)
    assert (caught.value.reason, caught.value.field) == ("ADAPTER_NUMERICS", name)
