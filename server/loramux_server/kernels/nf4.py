"""Product with an NF4 weight that stays packed: `nf4_linear(x [M, K], weight [N, K], bias [N]) -> [M, N]`.

The weight is packed once, at load, into the order in which the kernel's threads take it; nothing else of it is kept.
Its values are level x maximum of the block; the float32 sum of a block's 64 products is scaled by its maximum, so the
only rounding of the weight is that of the sixteen levels to bfloat16. `nf4_dequantize` rounds level x maximum instead,
as bitsandbytes does.

A row of the result depends on that row of x alone: not on the other rows and, with `batch_invariant`, not on M.

A packed weight is `[N / 64 rounded up, K / 64, 2304]` uint8, a piece a 64 x 64 block: 2048 bytes of codes and 64
float32 maxima. The codes are those of a wgmma A operand, m64k16, in registers: 16 bytes a thread, a word for each 16
along K, whose eight codes are rows (2g, 2g + 1) x columns (2q, 2q + 1) and the same of columns 8 further, with
g = lane / 4 and q = lane % 4; the low half of a byte is the even column. A warp has 16 rows.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight

BLOCK = 64
"""Rows and columns of a packed block."""
BLOCK_BYTES = 2304
"""Bytes of a packed block: half a byte a code, four bytes a row for its maximum."""
MOST_TILES = 8
"""Tiles of 64 rows of x that one launch takes."""
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedNf4:
    """A packed weight.

    Attributes:
        blocks: `[N / 64 rounded up, K / 64, 2304]` uint8, 16-byte aligned; rows past N hold zeros.
        shape: `(N, K)`.
        arrivals: int32 counters of the kernel, zero between calls; so two calls with one weight must be in order.
    """

    blocks: Tensor
    shape: tuple[int, int]
    arrivals: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and maxima."""
        return self.blocks.nbytes


@functools.cache
def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run here, None if it can.

    Args:
        device: Where the products run.
        dtype: Of x and of the result.
    """
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    from loramux_server.kernels.nf4_sm90 import unavailable

    return unavailable(device)


def shape_unsupported(shape: tuple[int, int]) -> str | None:
    """Why the kernel cannot take a weight of this shape, None if it can.

    Args:
        shape: `(N, K)`.
    """
    n, k = shape
    if n % 2:
        return f"it writes two columns at once, and N = {n} is odd"
    if k % BLOCK:
        return f"K = {k} is no multiple of {BLOCK}"
    return None


def prepare(shape: tuple[int, int], device: torch.device) -> None:
    """Compile what products with a weight of this shape need, once, so that no step waits for it.

    Args:
        shape: `(N, K)`, supported.
        device: CUDA, supported.

    Raises:
        KernelError: It cannot be compiled or loaded.
    """
    from loramux_server.kernels import nf4_sm90

    nf4_sm90.prepare(shape, device)


def pack(weight: Nf4Weight) -> PackedNf4:
    """Bring a weight into the kernel's order, on its device.

    Args:
        weight: `[N, K]`, K a multiple of 64.
    """
    n, k = weight.shape
    rows, columns = -(-n // BLOCK), k // BLOCK
    blocks = torch.zeros(rows, columns, BLOCK_BYTES, dtype=torch.uint8, device=weight.codes.device)
    for first in range(0, n, _ROWS_AT_ONCE):
        part = slice(first, min(first + _ROWS_AT_ONCE, n))
        _pack_rows(blocks[first // BLOCK : -(-part.stop // BLOCK)], weight.codes[part], weight.absmax[part])
    # Last: the kernel reads `blocks` before what is right in front of it is over, and that is now this.
    arrivals = torch.zeros((rows + 3) * MOST_TILES, dtype=torch.int32, device=weight.codes.device)
    return PackedNf4(blocks=blocks, shape=(n, k), arrivals=arrivals)


def _pack_rows(blocks: Tensor, codes: Tensor, maxima: Tensor) -> None:
    rows, columns = blocks.shape[:2]
    padding = rows * BLOCK - len(codes)
    codes, maxima = F.pad(codes, (0, 0, 0, padding)), F.pad(maxima, (0, 0, 0, padding))
    # The checkpoint has the even column in the high half of a byte, the kernel in the low one.
    codes = (codes >> 4) | (codes << 4)
    # Rows: block, warp, g, row of the pair. Columns: block, 16 of 64, half, q; two columns a byte.
    split = codes.view(rows, 4, 8, 2, columns, 4, 2, 4)
    # A word's bytes: half (slow), row of the pair (fast).
    ordered = split.permute(0, 4, 1, 2, 7, 5, 6, 3)
    blocks[..., : BLOCK * BLOCK // 2] = ordered.reshape(rows, columns, -1)
    by_block = maxima.view(rows, BLOCK, columns).transpose(1, 2).contiguous()
    blocks[..., BLOCK * BLOCK // 2 :] = by_block.view(torch.uint8).view(rows, columns, -1)


def unpack(packed: PackedNf4) -> Nf4Weight:
    """The inverse of `pack`."""
    n, k = packed.shape
    rows, columns = packed.blocks.shape[:2]
    ordered = packed.blocks[..., : BLOCK * BLOCK // 2].view(rows, columns, 4, 8, 4, 4, 2, 2)
    codes = ordered.permute(0, 2, 3, 7, 1, 5, 6, 4).reshape(rows * BLOCK, k // 2)[:n]
    by_block = packed.blocks[..., BLOCK * BLOCK // 2 :].contiguous().view(torch.float32)
    maxima = by_block.transpose(1, 2).reshape(rows * BLOCK, columns)[:n]
    return Nf4Weight(
        codes=((codes >> 4) | (codes << 4)).contiguous(), absmax=maxima.contiguous(), source_dtype=torch.bfloat16
    )


def nf4_linear(x: Tensor, weight: PackedNf4, bias: Tensor | None, *, batch_invariant: bool = False) -> Tensor:
    """The product.

    Args:
        x: `[M, K]` bfloat16, contiguous, 16-byte aligned.
        weight: `[N, K]`.
        bias: `[N]` bfloat16 or None.
        batch_invariant: Give a row the same bits for every M.

    Returns:
        `[M, N]` bfloat16.
    """
    if unsupported(x.device, x.dtype) is None and shape_unsupported(weight.shape) is None:
        from loramux_server.kernels import nf4_sm90

        return nf4_sm90.linear(x, weight, bias, batch_invariant=batch_invariant)
    return nf4_linear_torch(x, weight, bias)


def nf4_linear_torch(x: Tensor, weight: PackedNf4, bias: Tensor | None) -> Tensor:
    """`nf4_linear` in float32: the reference."""
    plain = unpack(weight)
    levels = nf4.levels(x.device).to(torch.bfloat16).float()
    codes = torch.stack((plain.codes >> 4, plain.codes & 15), dim=-1).view(plain.shape)
    values = levels[codes.long()] * plain.absmax.repeat_interleave(BLOCK, dim=1)
    product = x.float() @ values.T
    return (product if bias is None else product + bias.float()).to(x.dtype)


def nf4_dequantize(weight: PackedNf4, dtype: torch.dtype) -> Tensor:
    """The dense weight `[N, K]`: level x maximum in float32, rounded once to `dtype`.

    Args:
        weight: Packed weight.
        dtype: Of the result.
    """
    if unsupported(weight.blocks.device, dtype) is None:
        from loramux_server.kernels import nf4_sm90

        return nf4_sm90.dequantize(weight)
    return nf4.dequantize(unpack(weight), dtype)
