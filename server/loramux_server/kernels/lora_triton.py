# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `lora`: one shrink and one expand launch a group.

Work tiles are blocks of rows of one segment. Their number is bounded on the host (`T / rows a tile + segments`); each
program finds its segment on the device and the surplus ones end at once, so a captured graph serves any mix.

Shrink writes float32 partial sums over fixed cuts of K, `[cuts, slices, T, rank]` in sorted token order; expand adds
the cuts in ascending order, rounds to the slab's dtype for the product with B, and applies the scale in float32. Cuts
and tile shapes depend on K and the slab only and the row count of a tile is that of one tensor core instruction or two,
so a row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.batch import LoraBatch, LoraGroup
from loramux_server.kernels.lora import MAX_SLICES

_CUT = 2048
_MAX_CUTS = 8


@triton.jit
def _segment_of(tile, segment_slots, segment_starts, num_segments, TILE: tl.constexpr, SEGMENTS_BLOCK: tl.constexpr):
    """Find a tile's segment: its slot (-1 if there is none), first sorted row and end."""
    g = tl.arange(0, SEGMENTS_BLOCK)
    used = g < num_segments
    slots = tl.load(segment_slots + g, mask=used, other=-1)
    begins = tl.load(segment_starts + g, mask=used, other=0)
    ends = tl.load(segment_starts + g + 1, mask=used, other=0)
    tiles = tl.where(slots >= 0, (ends - begins + TILE - 1) // TILE, 0)
    after = tl.cumsum(tiles, 0)
    mine = (tile < after) & (tile >= after - tiles)
    slot = tl.max(tl.where(mine, slots, -1), 0)
    row = tl.sum(tl.where(mine, begins + (tile - after + tiles) * TILE, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    return slot, row, end


@triton.jit(do_not_specialize=["num_segments", "tokens"])
def _shrink(
    x,
    a,
    partial,
    order,
    segment_slots,
    segment_starts,
    first_rows,
    ranks,
    x_stride,
    num_segments,
    tokens,
    slab_rows,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    CUTS: tl.constexpr,
    TILE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    SEGMENTS_BLOCK: tl.constexpr,
):
    slot, row, end = _segment_of(tl.program_id(0), segment_slots, segment_starts, num_segments, TILE, SEGMENTS_BLOCK)
    if slot < 0:
        return
    blocks: tl.constexpr = (MAX_RANK + RANK_BLOCK - 1) // RANK_BLOCK
    s = tl.program_id(1) // blocks
    j = (tl.program_id(1) % blocks) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    rank = tl.load(ranks + slot * SLICES + s)
    if (tl.program_id(1) % blocks) * RANK_BLOCK >= rank:
        return
    cut = tl.program_id(2)
    i = row + tl.arange(0, TILE)
    token = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
    slab_row = s * slab_rows.to(tl.int64) + tl.load(first_rows + slot) + j
    steps: tl.constexpr = ((WIDTH + CUTS - 1) // CUTS + WIDTH_BLOCK - 1) // WIDTH_BLOCK
    begin = cut * (steps * WIDTH_BLOCK)
    total = tl.zeros((TILE, RANK_BLOCK), dtype=tl.float32)
    for step in range(steps):
        k = begin + step * WIDTH_BLOCK + tl.arange(0, WIDTH_BLOCK)
        values = tl.load(
            x + token[:, None] * x_stride + k[None, :], mask=(i < end)[:, None] & (k < WIDTH)[None, :], other=0.0
        )
        rows = tl.load(
            a + slab_row[None, :] * WIDTH + k[:, None], mask=(j < rank)[None, :] & (k < WIDTH)[:, None], other=0.0
        )
        total = tl.dot(values, rows, total, input_precision="ieee")
    place = ((cut * SLICES + s) * tokens.to(tl.int64) + i) * MAX_RANK
    tl.store(partial + place[:, None] + j[None, :], total, mask=(i < end)[:, None] & (j < rank)[None, :])


@triton.jit(do_not_specialize=["num_segments", "tokens"])
def _expand(
    partial,
    b,
    out,
    order,
    segment_slots,
    segment_starts,
    first_rows,
    ranks,
    scales,
    out_stride,
    num_segments,
    tokens,
    END0: tl.constexpr,
    END1: tl.constexpr,
    END2: tl.constexpr,
    SLICES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    CUTS: tl.constexpr,
    TILE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    SEGMENTS_BLOCK: tl.constexpr,
):
    slot, row, end = _segment_of(tl.program_id(0), segment_slots, segment_starts, num_segments, TILE, SEGMENTS_BLOCK)
    if slot < 0:
        return
    # Column blocks are counted slice by slice, so that none spans two slices.
    blocks0: tl.constexpr = (END0 + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    blocks1: tl.constexpr = blocks0 + (END1 - END0 + COLUMN_BLOCK - 1) // COLUMN_BLOCK
    block = tl.program_id(1)
    s = (block >= blocks0).to(tl.int32) + (block >= blocks1).to(tl.int32)
    begin = tl.where(s == 0, 0, tl.where(s == 1, END0, END1))
    stop = tl.where(s == 0, END0, tl.where(s == 1, END1, END2))
    before = tl.where(s == 0, 0, tl.where(s == 1, blocks0, blocks1))
    rank = tl.load(ranks + slot * SLICES + s)
    if rank == 0:
        return
    scale = tl.load(scales + slot * SLICES + s)
    n = begin + (block - before) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    i = row + tl.arange(0, TILE)
    token = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
    first = tl.load(first_rows + slot).to(tl.int64)
    total = tl.zeros((TILE, COLUMN_BLOCK), dtype=tl.float32)
    for start in range(0, rank, RANK_BLOCK):
        j = start + tl.arange(0, RANK_BLOCK)
        narrow = tl.zeros((TILE, RANK_BLOCK), dtype=tl.float32)
        for cut in tl.static_range(CUTS):
            place = ((cut * SLICES + s) * tokens.to(tl.int64) + i) * MAX_RANK
            narrow += tl.load(
                partial + place[:, None] + j[None, :], mask=(i < end)[:, None] & (j < rank)[None, :], other=0.0
            )
        rows = tl.load(
            b + (first + j)[:, None] * END2 + n[None, :], mask=(j < rank)[:, None] & (n < stop)[None, :], other=0.0
        )
        total = tl.dot(narrow.to(b.dtype.element_ty), rows, total, input_precision="ieee")
    place = out + token[:, None] * out_stride + n[None, :]
    inside = (i < end)[:, None] & (n < stop)[None, :]
    result = tl.load(place, mask=inside, other=0.0).to(tl.float32) + scale * total
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


def lora_add_triton(x: Tensor, out: Tensor, group: LoraGroup, batch: LoraBatch) -> None:
    """Triton form of `lora_add`."""
    tokens, width = x.shape
    slices, slab_rows, _ = group.a.shape
    segments = batch.num_segments
    if tokens == 0 or segments == 0 or group.max_rank == 0:
        return
    tile = 16 if tokens <= 256 else 32
    tiles = min(tokens, triton.cdiv(tokens, tile) + segments)
    cuts = min(_MAX_CUTS, triton.cdiv(width, _CUT))
    rank_block = min(64, max(16, triton.next_power_of_2(group.max_rank)))
    wide = x.dtype == torch.float32
    segments_block = triton.next_power_of_2(segments)
    partial = torch.empty((cuts, slices, tokens, group.max_rank), dtype=torch.float32, device=x.device)
    _shrink[(tiles, slices * triton.cdiv(group.max_rank, rank_block), cuts)](
        x,
        group.a,
        partial,
        batch.order,
        batch.segment_slots,
        batch.segment_starts,
        group.first_rows,
        group.ranks,
        x.stride(0),
        segments,
        tokens,
        slab_rows,
        WIDTH=width,
        SLICES=slices,
        MAX_RANK=group.max_rank,
        CUTS=cuts,
        TILE=tile,
        RANK_BLOCK=rank_block,
        WIDTH_BLOCK=32 if wide else 128,
        SEGMENTS_BLOCK=segments_block,
        num_warps=4,
        num_stages=2 if wide else 3,
    )
    ends = [*group.slice_ends, *[group.slice_ends[-1]] * (MAX_SLICES - slices)]
    column_block = 64 if wide else 128
    begins = [0, *group.slice_ends[:-1]]
    column_blocks = sum(
        triton.cdiv(end - begin, column_block) for begin, end in zip(begins, group.slice_ends, strict=True)
    )
    _expand[(tiles, column_blocks)](
        partial,
        group.b,
        out,
        batch.order,
        batch.segment_slots,
        batch.segment_starts,
        group.first_rows,
        group.ranks,
        group.scales,
        out.stride(0),
        segments,
        tokens,
        END0=ends[0],
        END1=ends[1],
        END2=ends[2],
        SLICES=slices,
        MAX_RANK=group.max_rank,
        CUTS=cuts,
        TILE=tile,
        RANK_BLOCK=min(32, rank_block),
        COLUMN_BLOCK=column_block,
        SEGMENTS_BLOCK=segments_block,
        num_warps=4,
        num_stages=2,
    )
