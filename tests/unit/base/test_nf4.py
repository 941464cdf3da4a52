"""NF4 bytes: equal to bitsandbytes', exact under concatenation, round trip through the checkpoint layout."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from loramux_base import nf4
from loramux_base.nf4 import Nf4Error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    drawn[0, :64] = 0.0  # an all-zero block
    drawn[-1, -1] = 40.0  # an outlier
    drawn[-1, 0] = torch.tensor(1e-30)
    return drawn.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (96, 896), (1500, 3072)])
def test_bytes_equal_bitsandbytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    source = weight(*shape, dtype)
    codes, state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4")
    ours = nf4.quantize(source)
    assert torch.equal(ours.codes.view(-1), codes.view(-1))
    assert torch.equal(ours.absmax.view(-1), state.absmax)
    assert ours.shape == shape and ours.source_dtype == dtype


def test_ties_and_every_level_equal_bitsandbytes() -> None:
    table = torch.tensor(nf4.LEVELS)
    middles = (table[:-1] + table[1:]) / 2
    row = torch.cat([table, middles, torch.nextafter(middles, torch.tensor(9.0)), torch.ones(18)])
    codes, _ = bnb.quantize_4bit(row[None], blocksize=64, quant_type="nf4")
    assert torch.equal(nf4.quantize(row[None]).codes.view(-1), codes.view(-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_equal_bitsandbytes(dtype: torch.dtype) -> None:
    source = weight(33, 320)
    codes, state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4")
    state.dtype = dtype
    assert torch.equal(nf4.dequantize(nf4.quantize(source), dtype), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_bitsandbytes_product(dtype: torch.dtype) -> None:
    codes, state = bnb.quantize_4bit(weight(33, 320, dtype), blocksize=64, quant_type="nf4")
    ours = nf4.dequantize(nf4.quantize(weight(33, 320, dtype)), torch.float32)
    # What its product multiplies: the compute dtype is asked of the operator, whatever the source was.
    theirs = torch.ops.bitsandbytes.dequantize_4bit(codes, state.absmax, 64, "nf4", [33, 320], torch.float32)
    assert torch.equal(ours, theirs)


def test_dequantize_writes_into_a_buffer() -> None:
    quantized = nf4.quantize(weight(8, 128))
    buffer = torch.full((8, 128), torch.nan, dtype=torch.bfloat16)
    assert nf4.dequantize(quantized, torch.bfloat16, out=buffer) is buffer
    assert torch.equal(buffer, nf4.dequantize(quantized, torch.bfloat16))


def test_quantizing_its_own_values_changes_nothing() -> None:
    once = nf4.quantize(weight(16, 256))
    twice = nf4.quantize(nf4.dequantize(once, torch.float32))
    assert torch.equal(once.codes, twice.codes) and torch.equal(once.absmax, twice.absmax)


def test_concatenation_is_exact() -> None:
    parts = [weight(24, 128, seed=1), weight(8, 128, seed=2), weight(8, 128, seed=3)]
    joined = nf4.concatenate([nf4.quantize(part) for part in parts])
    whole = nf4.quantize(torch.cat(parts))
    assert torch.equal(joined.codes, whole.codes) and torch.equal(joined.absmax, whole.absmax)
    assert joined.shape == (40, 128)
    with pytest.raises(Nf4Error, match="widths"):
        nf4.concatenate([nf4.quantize(weight(4, 64)), nf4.quantize(weight(4, 128))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoint_layout_round_trip(dtype: torch.dtype) -> None:
    quantized = nf4.quantize(weight(12, 192, dtype))
    tensors = nf4.to_tensors("q.weight", quantized)
    state = bnb.QuantState.from_dict({key[2:]: value for key, value in tensors.items() if key != "q.weight"}, "cpu")
    assert state.shape == (12, 192) and state.dtype == dtype and state.blocksize == 64 and not state.nested
    assert tensors["q.weight"].shape == (12 * 192 // 2, 1)
    again = nf4.from_tensors("q.weight", tensors.__getitem__, nested=False)
    assert torch.equal(again.codes, quantized.codes) and torch.equal(again.absmax, quantized.absmax)
    assert sum(tensor.nbytes for tensor in tensors.values()) <= nf4.stored_bytes((12, 192)) + 32


def test_reads_double_quantization() -> None:
    source = weight(96, 896)
    codes, state = bnb.quantize_4bit(source, blocksize=64, quant_type="nf4", compress_statistics=True)
    tensors = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()} | {"w": codes}
    state.dtype = torch.float32
    read = nf4.from_tensors("w", tensors.__getitem__, nested=True)
    assert torch.equal(nf4.dequantize(read, torch.float32), bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.zeros(4, 63), "multiple of 64"),
        (torch.zeros(64), "matrix"),
        (torch.zeros(4, 64, dtype=torch.int32), "float32, bfloat16 or float16"),
        (torch.full((2, 64), torch.nan), "NaN or infinity"),
        (torch.full((2, 64), torch.inf), "NaN or infinity"),
    ],
)
def test_refuses(bad: Tensor, match: str) -> None:
    with pytest.raises(Nf4Error, match=match):
        nf4.quantize(bad)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"state": {"quant_type": "fp4"}}, "fp4"),
        ({"state": {"blocksize": 128}}, "128"),
        ({"state": {"shape": [8, 64]}}, "do not fit"),
        ({"state": {"dtype": "nonsense"}}, "unreadable"),
        ({"map": torch.zeros(16)}, "level table"),
    ],
)
def test_refuses_other_layouts(change: dict[str, object], match: str) -> None:
    tensors = nf4.to_tensors("w", nf4.quantize(weight(4, 64)))
    if "map" in change:
        tensors["w" + nf4.SUFFIX_MAP] = change["map"]  # type: ignore[assignment]
    else:
        state = json.loads(bytes(tensors["w" + nf4.SUFFIX_STATE].tolist())) | change["state"]  # type: ignore[operator]
        tensors["w" + nf4.SUFFIX_STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(Nf4Error, match=match):
        nf4.from_tensors("w", tensors.__getitem__, nested=False)
