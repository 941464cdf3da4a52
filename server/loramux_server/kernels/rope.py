"""Rotary embedding of queries and keys, fused with the write of keys and values into the paged cache.

`rope_and_write(q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D], cos_sin [max_pos, 2, rot / 2], batch, kv)`:

- Half-rotation layout: with `c, s = cos_sin[positions]`, columns `[0, rot / 2)` become `x1 * c - x2 * s` and columns
  `[rot / 2, rot)` become `x2 * c + x1 * s`; columns past `rot` pass through (partial rotary). The table is float32, so
  is the arithmetic, and the result is rounded once to the dtype of q.
- Keys (rotated) and values go to `kv [pages, 2, page, Hkv, D]` at `batch.kv_slots`; several padding tokens may write
  the same place of page 0, whose contents nobody may read.
- q, k and v may be views of one fused projection (unit stride in D). They are not modified; the rotated queries are
  returned, contiguous.
"""

import torch
from torch import Tensor

from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.capability import use_triton


def rope_and_write(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: ForwardBatch, kv: Tensor) -> Tensor:
    """Rotate q and k, write k and v into the cache.

    Args:
        q: `[T, Hq, D]`.
        k: `[T, Hkv, D]`.
        v: `[T, Hkv, D]`.
        cos_sin: `[max_pos, 2, rot / 2]` float32, cosines then sines.
        batch: Its positions and kv_slots are read.
        kv: `[pages, 2, page, Hkv, D]`, written in place.

    Returns:
        The rotated queries, `[T, Hq, D]`.
    """
    if use_triton(q, "rope_and_write", _unsupported(q, k, v)):
        from loramux_server.kernels.rope_triton import rope_and_write_triton

        return rope_and_write_triton(q, k, v, cos_sin, batch, kv)
    return rope_and_write_torch(q, k, v, cos_sin, batch, kv)


def rope_and_write_torch(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: ForwardBatch, kv: Tensor) -> Tensor:
    """Torch form of `rope_and_write`."""
    table = cos_sin.index_select(0, batch.positions)
    cos, sin = table[:, None, 0], table[:, None, 1]
    rotated = _rotate(k, cos, sin)
    page_size = kv.shape[2]
    page, offset = torch.div(batch.kv_slots, page_size, rounding_mode="floor"), batch.kv_slots % page_size
    row = page * (2 * page_size) + offset
    flat = kv.view(-1, kv.shape[3], kv.shape[4])
    flat.index_copy_(0, row, rotated)
    flat.index_copy_(0, row + page_size, v.to(kv.dtype))
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[T, H, D]` by `[T, 1, rot / 2]` tables."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def _unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Name what the Triton form cannot take, None if nothing."""
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        return "head dimension is not contiguous"
    return None
