# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `lora`: one shrink and one expand launch a group.

Work tiles are blocks of rows of one segment. Their number is bounded on the host (`T / rows a tile + segments`); a
small kernel lists them on the device, once a step, and the programs of surplus ones end at once, so a captured graph
serves any mix.

Shrink cuts K into pieces, so that enough programs read A at once. Each writes float32 partial sums `[cuts, slices, T,
rank]` in sorted token order; of the programs of one tile and slice, the one that comes last adds the pieces in
ascending order and rounds to the slab's dtype. Expand multiplies that with B and applies the scale in float32. Cuts and
tile shapes depend on K and the slab only and the row count of a tile is that of one tensor core instruction or two, so
a row's bits do not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.batch import LoraBatch, LoraGroup
from loramux_server.kernels.lora import MAX_SLICES
from loramux_server.kernels.overlap_triton import launch_options, wait_for_front

# Measured with 32 adapters of rank 16 on the shapes of a 7B.
_CUT = 512
_MAX_CUTS = 20
_SHRINK_BLOCK = 128
_SHRINK_WARPS = 2
_SHRINK_STAGES = 3
_EXPAND_BLOCK = 256
_EXPAND_WARPS = 4
# Columns of the work list: slot, first sorted row, end of the segment, then a counter for each slice and rank block.
_TILE_COLUMNS = 64
_FIRST_COUNTER = 3


@triton.jit(do_not_specialize=["num_segments"])
def _plan(
    tiles,
    segment_slots,
    segment_starts,
    num_segments,
    TILE: tl.constexpr,
    SEGMENTS_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile's slot (-1 if it has no work), first sorted row and end, and set its counters to 0."""
    wait_for_front()
    tile = tl.program_id(0)
    g = tl.arange(0, SEGMENTS_BLOCK)
    used = g < num_segments
    slots = tl.load(segment_slots + g, mask=used, other=-1)
    begins = tl.load(segment_starts + g, mask=used, other=0)
    ends = tl.load(segment_starts + g + 1, mask=used, other=0)
    counts = tl.where(slots >= 0, (ends - begins + TILE - 1) // TILE, 0)
    after = tl.cumsum(counts, 0)
    mine = (tile < after) & (tile >= after - counts)
    slot = tl.max(tl.where(mine, slots, -1), 0)
    row = tl.sum(tl.where(mine, begins + (tile - after + counts) * TILE, 0), 0)
    end = tl.sum(tl.where(mine, ends, 0), 0)
    column = tl.arange(0, COLUMNS)
    entry = tl.where(column == 0, slot, tl.where(column == 1, row, tl.where(column == 2, end, 0)))
    tl.store(tiles + tile * COLUMNS + column, entry)


@triton.jit(do_not_specialize=["tokens"])
def _shrink(
    x,
    a,
    partial,
    narrow,
    order,
    tiles,
    first_rows,
    ranks,
    x_stride,
    tokens,
    slab_rows,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    CUTS: tl.constexpr,
    TILE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    FIRST_COUNTER: tl.constexpr,
):
    wait_for_front()
    tile = tiles + TILE_COLUMNS * tl.program_id(0)
    slot, row, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if slot < 0:
        return
    blocks: tl.constexpr = (MAX_RANK + RANK_BLOCK - 1) // RANK_BLOCK
    s = tl.program_id(1) // blocks
    j = (tl.program_id(1) % blocks) * RANK_BLOCK + tl.arange(0, RANK_BLOCK)
    # Loads that do not need one another come before the branch on one of them: each costs the whole way to memory.
    rank = tl.load(ranks + slot * SLICES + s)
    first = tl.load(first_rows + slot)
    i = row + tl.arange(0, TILE)
    token = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
    if (tl.program_id(1) % blocks) * RANK_BLOCK >= rank:
        return
    cut = tl.program_id(2)
    slab_row = s * slab_rows.to(tl.int64) + first + j
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
    place = (s * tokens.to(tl.int64) + i[:, None]) * MAX_RANK + j[None, :]
    mask = (i < end)[:, None] & (j < rank)[None, :]
    if CUTS > 1:
        cut_size = SLICES * tokens.to(tl.int64) * MAX_RANK
        tl.store(partial + cut * cut_size + place, total, mask=mask)
        # All of this program's stores come before its count; whoever counts last sees all of them.
        tl.debug_barrier()
        counter = tile + FIRST_COUNTER + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel") < CUTS - 1:
            return
        tl.store(counter, 0)
        total = tl.zeros((TILE, RANK_BLOCK), dtype=tl.float32)
        for other in tl.static_range(CUTS):
            total += tl.load(partial + other * cut_size + place, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(narrow + place, total.to(narrow.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    narrow,
    b,
    out,
    order,
    tiles,
    first_rows,
    ranks,
    scales,
    out_stride,
    tokens,
    END0: tl.constexpr,
    END1: tl.constexpr,
    END2: tl.constexpr,
    SLICES: tl.constexpr,
    MAX_RANK: tl.constexpr,
    TILE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    wait_for_front()
    tile = tiles + TILE_COLUMNS * tl.program_id(0)
    slot, row, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
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
    scale = tl.load(scales + slot * SLICES + s)
    first = tl.load(first_rows + slot).to(tl.int64)
    i = row + tl.arange(0, TILE)
    token = tl.load(order + i, mask=i < end, other=0).to(tl.int64)
    if rank == 0:
        return
    n = begin + (block - before) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    place = out + token[:, None] * out_stride + n[None, :]
    inside = (i < end)[:, None] & (n < stop)[None, :]
    base = tl.load(place, mask=inside, other=0.0)
    # The first block stands outside the loop, so that its loads go out with those above: most ranks end with it.
    shrunk = narrow + (s * tokens.to(tl.int64) + i[:, None]) * MAX_RANK
    columns = b + first * END2 + n[None, :]
    filled, seen = (i < end)[:, None], (n < stop)[None, :]
    j = tl.arange(0, RANK_BLOCK)
    left = tl.load(shrunk + j[None, :], mask=filled & (j < rank)[None, :], other=0.0)
    right = tl.load(columns + j[:, None] * END2, mask=(j < rank)[:, None] & seen, other=0.0)
    total = tl.dot(left, right, input_precision="ieee")
    for lower in range(RANK_BLOCK, rank, RANK_BLOCK):
        j = lower + tl.arange(0, RANK_BLOCK)
        left = tl.load(shrunk + j[None, :], mask=filled & (j < rank)[None, :], other=0.0)
        right = tl.load(columns + j[:, None] * END2, mask=(j < rank)[:, None] & seen, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(place, (base.to(tl.float32) + scale * total).to(out.dtype.element_ty), mask=inside)


def _tile_rows(tokens: int) -> int:
    """Rows of a work tile."""
    return 16 if tokens <= 256 else 32


def tiles_of(batch: LoraBatch) -> Tensor:
    """List the work tiles of a batch.

    Args:
        batch: On a CUDA device.

    Returns:
        `[tiles, 64]` int32: slot (-1 = no work), first sorted row, end of the segment, counters that are 0 between
        launches.
    """
    tokens, segments = len(batch.order), batch.num_segments
    rows = _tile_rows(tokens)
    tiles = torch.empty(
        (min(tokens, triton.cdiv(tokens, rows) + segments), _TILE_COLUMNS),
        dtype=torch.int32,
        device=batch.order.device,
    )
    if len(tiles) > 0:
        _plan[(len(tiles),)](
            tiles,
            batch.segment_slots,
            batch.segment_starts,
            segments,
            TILE=rows,
            SEGMENTS_BLOCK=triton.next_power_of_2(max(1, segments)),
            COLUMNS=_TILE_COLUMNS,
            num_warps=1,
        )
    return tiles


class Update:
    """The low-rank update of one group's output: `shrink` reads A, `expand` reads B, in this order.

    Memory is taken when it is made, by the stream that is current then.

    Args:
        x: `[T, K]`, input of the group; only its shape and strides matter here.
        group: Slab of the group.
        batch: Which slot each token uses.

    Attributes:
        idle: There is nothing to add; then both halves do nothing.
    """

    def __init__(self, x: Tensor, group: LoraGroup, batch: LoraBatch) -> None:
        self._group = group
        self._batch = batch
        self._tokens, width = x.shape
        self.idle = self._tokens == 0 or batch.num_segments == 0 or group.max_rank == 0
        if self.idle:
            return
        self._tiles = tiles_of(batch) if batch.tiles is None else batch.tiles
        self._wide = x.dtype == torch.float32
        self._rank_block = min(32, max(16, triton.next_power_of_2(group.max_rank)))
        slices = len(group.slice_ends)
        self._blocks = slices * triton.cdiv(group.max_rank, self._rank_block)
        self._cuts = min(_MAX_CUTS, triton.cdiv(width, _CUT))
        if self._blocks > _TILE_COLUMNS - _FIRST_COUNTER:
            self._cuts = 1
        shape = (slices, self._tokens, group.max_rank)
        self._narrow = torch.empty(shape, dtype=x.dtype, device=x.device)
        self._partial = self._narrow
        if self._cuts > 1:
            self._partial = torch.empty((self._cuts, *shape), dtype=torch.float32, device=x.device)

    def shrink(self, x: Tensor, *, beside: bool = False) -> None:
        """Multiply by A.

        Args:
            x: As given to the constructor.
            beside: Whether other streams may have kernels in front.
        """
        if self.idle:
            return
        group = self._group
        _shrink[(len(self._tiles), self._blocks, self._cuts)](
            x,
            group.a,
            self._partial,
            self._narrow,
            self._batch.order,
            self._tiles,
            group.first_rows,
            group.ranks,
            x.stride(0),
            self._tokens,
            group.a.shape[1],
            WIDTH=x.shape[1],
            SLICES=len(group.slice_ends),
            MAX_RANK=group.max_rank,
            CUTS=self._cuts,
            TILE=_tile_rows(self._tokens),
            RANK_BLOCK=self._rank_block,
            WIDTH_BLOCK=32 if self._wide else _SHRINK_BLOCK,
            TILE_COLUMNS=_TILE_COLUMNS,
            FIRST_COUNTER=_FIRST_COUNTER,
            num_warps=_SHRINK_WARPS,
            num_stages=2 if self._wide else _SHRINK_STAGES,
            **({} if beside else launch_options()),
        )

    def expand(self, out: Tensor, *, beside: bool = False) -> None:
        """Multiply by B and add to the output.

        Args:
            out: `[T, N]`, the base product; updated in place.
            beside: As in `shrink`.
        """
        if self.idle:
            return
        group, slices = self._group, len(self._group.slice_ends)
        ends = [*group.slice_ends, *[group.slice_ends[-1]] * (MAX_SLICES - slices)]
        column_block = 64 if self._wide else _EXPAND_BLOCK
        begins = [0, *group.slice_ends[:-1]]
        column_blocks = sum(
            triton.cdiv(end - begin, column_block) for begin, end in zip(begins, group.slice_ends, strict=True)
        )
        _expand[(len(self._tiles), column_blocks)](
            self._narrow,
            group.b,
            out,
            self._batch.order,
            self._tiles,
            group.first_rows,
            group.ranks,
            group.scales,
            out.stride(0),
            self._tokens,
            END0=ends[0],
            END1=ends[1],
            END2=ends[2],
            SLICES=slices,
            MAX_RANK=group.max_rank,
            TILE=_tile_rows(self._tokens),
            RANK_BLOCK=16,
            COLUMN_BLOCK=column_block,
            TILE_COLUMNS=_TILE_COLUMNS,
            num_warps=_EXPAND_WARPS,
            num_stages=2,
            **({} if beside else launch_options()),
        )


def lora_add_triton(x: Tensor, out: Tensor, group: LoraGroup, batch: LoraBatch) -> None:
    """Triton form of `lora_add`."""
    update = Update(x, group, batch)
    update.shrink(x)
    update.expand(out)
