"""NF4 weights as bytes: quantize, dequantize, and their layout in a pre-quantized bitsandbytes checkpoint.

A weight `[N, K]` is cut along K into blocks of 64 (K must be a multiple of 64, so that no block crosses a row and rows
of several weights may be concatenated). A block stores one float32 absolute maximum and 64 codes of 4 bits: the index
of the level nearest to value / maximum; the even element sits in the high half of its byte. Value = level * maximum in
float32, rounded once to the compute dtype, as bitsandbytes' product does. The bytes equal those of bitsandbytes' CPU
`quantize_4bit` bit for bit.

NF4 levels: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, appendix E.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_SIZE = 64
"""Elements that share one absolute maximum."""

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen NF4 levels."""

SUFFIX_ABSMAX = ".absmax"
SUFFIX_MAP = ".quant_map"
SUFFIX_STATE = ".quant_state.bitsandbytes__nf4"
SUFFIX_NESTED_ABSMAX = ".nested_absmax"
SUFFIX_NESTED_MAP = ".nested_quant_map"
_NESTED_BLOCK = 256
_ROWS_AT_ONCE = 1 << 22


class Nf4Error(ValueError):
    """A weight that NF4 cannot hold, or stored NF4 tensors that do not fit together."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Weight:
    """A quantized linear weight.

    Attributes:
        codes: `[N, K / 2]` uint8, two codes a byte, even element in the high half.
        absmax: `[N, K / 64]` float32.
        source_dtype: dtype of the weight before quantization; written into the checkpoint.
    """

    codes: Tensor
    absmax: Tensor
    source_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`: output and input width."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes of codes and maxima."""
        return self.codes.nbytes + self.absmax.nbytes

    def to(self, device: torch.device | str) -> "Nf4Weight":
        """The same weight on a device."""
        return dataclasses.replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device))


@functools.cache
def levels(device: torch.device) -> Tensor:
    """`[16]` float32: `LEVELS` on the device."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """`[256, 2]` float32: both levels of a byte."""
    table = levels(device)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1).contiguous()


def quantize(weight: Tensor) -> Nf4Weight:
    """Quantize a weight.

    Args:
        weight: `[N, K]` float32, bfloat16 or float16; K a multiple of 64.

    Raises:
        Nf4Error: Wrong shape or dtype, or values that are not finite.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK_SIZE:
        raise Nf4Error(f"NF4 needs a matrix whose width is a multiple of {BLOCK_SIZE}, got {tuple(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Nf4Error(f"NF4 quantizes float32, bfloat16 or float16 weights, got {weight.dtype}")
    rows, width = weight.shape
    table = levels(weight.device)
    bounds = (table[:-1] + table[1:]) / 2
    codes = torch.empty(rows, width // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, width // BLOCK_SIZE, dtype=torch.float32, device=weight.device)
    step = max(1, _ROWS_AT_ONCE // width)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        blocks = weight[part].float().reshape(-1, width // BLOCK_SIZE, BLOCK_SIZE)
        maxima = blocks.abs().amax(dim=-1)
        if not bool(torch.isfinite(maxima).all()):
            raise Nf4Error("the weight holds NaN or infinity; the checkpoint is damaged")
        # the reciprocal and the clamp to 1e-38 (an all-zero block) are part of the format: division rounds differently
        scaled = (blocks * (1.0 / maxima.clamp(min=1e-38)).unsqueeze(-1)).clamp(-1, 1)
        index = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8).reshape(-1, width // 2, 2)
        codes[part] = (index[..., 0] << 4) | index[..., 1]
        absmax[part] = maxima
    return Nf4Weight(codes=codes, absmax=absmax, source_dtype=weight.dtype)


def dequantize(weight: Nf4Weight, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """The dense weight `[N, K]`: level * maximum in float32, rounded once to `dtype`.

    Args:
        weight: Quantized weight.
        dtype: Of the result.
        out: Buffer for the result, `[N, K]` of `dtype`.
    """
    rows, width = weight.shape
    if out is None:
        out = torch.empty(rows, width, dtype=dtype, device=weight.codes.device)
    pairs = _pairs(weight.codes.device)
    step = max(1, _ROWS_AT_ONCE // width)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        values = torch.nn.functional.embedding(weight.codes[part].int(), pairs)
        values = values.view(-1, width // BLOCK_SIZE, BLOCK_SIZE) * weight.absmax[part].unsqueeze(-1)
        out[part] = values.view(-1, width)
    return out


def concatenate(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """One weight, in memory of its own, whose rows are those of all in order; exact, since no block crosses a row.

    Args:
        weights: Of equal input width.

    Raises:
        Nf4Error: Different widths.
    """
    if len({weight.shape[1] for weight in weights}) != 1:
        raise Nf4Error(f"cannot join weights of input widths {[weight.shape[1] for weight in weights]}")
    return Nf4Weight(
        codes=torch.cat([weight.codes for weight in weights]),
        absmax=torch.cat([weight.absmax for weight in weights]),
        source_dtype=weights[0].source_dtype,
    )


def to_tensors(name: str, weight: Nf4Weight) -> dict[str, Tensor]:
    """Tensors of a pre-quantized bitsandbytes checkpoint for the parameter `name`.

    Args:
        name: Of the parameter, `....q_proj.weight`.
        weight: Quantized weight, on the CPU.
    """
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK_SIZE,
        "dtype": str(weight.source_dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    return {
        name: weight.codes.reshape(-1, 1),
        name + SUFFIX_ABSMAX: weight.absmax.reshape(-1),
        name + SUFFIX_MAP: torch.tensor(LEVELS, dtype=torch.float32),
        name + SUFFIX_STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def stored_bytes(shape: tuple[int, int]) -> int:
    """Bytes that `to_tensors` takes for a weight `[N, K]`, within a few bytes of its JSON state."""
    rows, width = shape
    return rows * width // 2 + rows * width // BLOCK_SIZE * 4 + 16 * 4 + 96


def from_tensors(name: str, get: Callable[[str], Tensor], *, nested: bool) -> Nf4Weight:
    """Read a weight of a pre-quantized bitsandbytes checkpoint.

    Args:
        name: Of the parameter.
        get: Tensor by name.
        nested: The maxima are themselves quantized ("double quantization"); they are expanded to float32.

    Raises:
        Nf4Error: Another level table, block size or shape than this module's.
    """
    try:
        state: dict[str, Any] = json.loads(bytes(get(name + SUFFIX_STATE).tolist()))
        rows, width = (int(value) for value in state["shape"])
        dtype = getattr(torch, str(state["dtype"]))
        block_size, kind = state["blocksize"], state["quant_type"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise Nf4Error(f"{name}: unreadable quantization state ({error!r})") from error
    if kind != "nf4" or block_size != BLOCK_SIZE or width % BLOCK_SIZE:
        raise Nf4Error(
            f"{name}: {kind} in blocks of {block_size}, width {width}; only NF4 in blocks of {BLOCK_SIZE} along a "
            "width that they divide is served"
        )
    if not torch.equal(get(name + SUFFIX_MAP), torch.tensor(LEVELS)):
        raise Nf4Error(f"{name}: its level table is not NF4's")
    codes, absmax = get(name), get(name + SUFFIX_ABSMAX)
    if nested:
        absmax = _expand(absmax, get(name + SUFFIX_NESTED_ABSMAX), get(name + SUFFIX_NESTED_MAP), state)
    if codes.dtype != torch.uint8 or codes.numel() * 2 != rows * width or absmax.numel() * BLOCK_SIZE != rows * width:
        raise Nf4Error(f"{name}: codes or maxima do not fit the shape {(rows, width)}")
    return Nf4Weight(
        codes=codes.reshape(rows, width // 2),
        absmax=absmax.float().reshape(rows, width // BLOCK_SIZE),
        source_dtype=dtype,
    )


def _expand(absmax: Tensor, nested_absmax: Tensor, nested_map: Tensor, state: dict[str, Any]) -> Tensor:
    if state.get("nested_blocksize") != _NESTED_BLOCK:
        raise Nf4Error(f"double quantization in blocks of {state.get('nested_blocksize')}, expected {_NESTED_BLOCK}")
    scales = nested_absmax.float().repeat_interleave(_NESTED_BLOCK)[: absmax.numel()]
    return nested_map.float()[absmax.reshape(-1).int()] * scales + float(state["nested_offset"])
