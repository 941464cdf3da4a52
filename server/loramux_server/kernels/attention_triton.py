# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `attention`.

One kernel: a program takes a tile of one sequence's query rows for one KV head (the query heads of that KV head packed
into the tile, `tokens x group`), and either the whole visible range of the cache or one split of it, a fixed number of
tokens at a fixed absolute position. Splits leave unnormalised sums and their maxima for a second kernel, which adds
them in ascending order.

- All sequences have one token: tiles of at least 16 rows, split.
- Mixed: tiles of several tokens, not split. With `batch_invariant` mixed batches take the shape of the first form, so
  that a token meets the same tile height, block and split wherever it is computed.

Grids come from host bounds; lengths, tables and the tile's sequence are read on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.overlap_triton import launch_options, wait_for_front

_SPLIT = 256
_MAX_SPLITS = 32
_INVARIANT_SPLIT = 512


@triton.jit
def _sequence_of(tile, query_starts, num_sequences, TOKENS: tl.constexpr, SEQUENCES_BLOCK: tl.constexpr):
    """Find a tile's sequence (-1 if there is none) and the index of its first token there."""
    s = tl.arange(0, SEQUENCES_BLOCK)
    used = s < num_sequences
    begins = tl.load(query_starts + s, mask=used, other=0)
    ends = tl.load(query_starts + s + 1, mask=used, other=0)
    tiles = (ends - begins + TOKENS - 1) // TOKENS
    after = tl.cumsum(tiles, 0)
    mine = (tile < after) & (tile >= after - tiles)
    sequence = tl.max(tl.where(mine, s, -1), 0)
    first = tl.sum(tl.where(mine, (tile - after + tiles) * TOKENS, 0), 0)
    return sequence, first


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "window"])
def _attend(
    q,
    kv,
    out,
    peaks,
    sums,
    query_starts,
    kv_lengths,
    page_tables,
    num_sequences,
    table_stride,
    q_stride,
    q_head_stride,
    scale,
    softcap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    RATIO_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    SEQUENCES_BLOCK: tl.constexpr,
):
    wait_for_front()
    kv_head = tl.program_id(1)
    if ONE_TOKEN:
        sequence = tl.program_id(0)
        first = 0
    else:
        sequence, first = _sequence_of(tl.program_id(0), query_starts, num_sequences, TOKENS, SEQUENCES_BLOCK)
    if sequence < 0:
        return
    start = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - start
    if first >= count:
        return
    length = tl.load(kv_lengths + sequence)

    row = tl.arange(0, ROWS)
    index = first + row // RATIO_BLOCK
    valid = (row // RATIO_BLOCK < TOKENS) & (index < count) & (row % RATIO_BLOCK < RATIO)
    head = kv_head * RATIO + row % RATIO_BLOCK
    token = (start + index).to(tl.int64)
    position = length - count + index
    column = tl.arange(0, HEAD_BLOCK)
    inside = column < HEAD_DIM
    queries = tl.load(
        q + token[:, None] * q_stride + head[:, None] * q_head_stride + column[None, :],
        mask=valid[:, None] & inside[None, :],
        other=0.0,
    )

    high = length - count + tl.minimum(first + TOKENS, count)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(0, length - count + first - window + 1)
    if SPLITS > 1:
        low = tl.maximum(low, tl.program_id(2) * SPLIT)
        high = tl.minimum(high, (tl.program_id(2) + 1) * SPLIT)

    peak = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    result = tl.zeros((ROWS, HEAD_BLOCK), dtype=tl.float32)
    for block in range((low // BLOCK) * BLOCK, high, BLOCK):
        at = block + tl.arange(0, BLOCK)
        # Positions outside [low, high) may lie in freed or trash pages: they are never loaded.
        seen = (at >= low) & (at < high)
        page = tl.load(page_tables + sequence * table_stride + at // PAGE, mask=seen, other=0).to(tl.int64)
        place = (page * (2 * PAGE) + at % PAGE) * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        keys = tl.load(kv + place[None, :] + column[:, None], mask=seen[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        allowed = seen[None, :] & (at[None, :] <= position[:, None])
        if HAS_WINDOW:
            allowed = allowed & (at[None, :] > position[:, None] - window)
        scores = tl.where(allowed, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(peak - base)
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(
            kv + place[:, None] + PAGE * KV_HEADS * HEAD_DIM + column[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        result = result * kept[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
        peak = higher

    if SPLITS > 1:
        entry = (token * HEADS + head) * SPLITS + tl.program_id(2)
        tl.store(peaks + entry, peak, mask=valid)
        tl.store(sums + entry, total, mask=valid)
        tl.store(
            out + entry[:, None] * HEAD_DIM + column[None, :],
            result,
            mask=valid[:, None] & inside[None, :] & (high > low),
        )
    else:
        result = result / total[:, None]
        tl.store(
            out + (token * HEADS + head)[:, None] * HEAD_DIM + column[None, :],
            result.to(out.dtype.element_ty),
            mask=valid[:, None] & inside[None, :],
        )


@triton.jit(do_not_specialize=["num_sequences"])
def _combine(
    partial,
    peaks,
    sums,
    query_starts,
    out,
    num_sequences,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """Add the splits of one token and head in ascending order; rows past the last sequence become 0."""
    wait_for_front()
    token = tl.program_id(0).to(tl.int64)
    entry = token * HEADS + tl.program_id(1)
    column = tl.arange(0, HEAD_BLOCK)
    inside = column < HEAD_DIM
    place = out + entry * HEAD_DIM + column
    if token >= tl.load(query_starts + num_sequences):
        tl.store(place, tl.zeros((HEAD_BLOCK,), dtype=out.dtype.element_ty), mask=inside)
        return
    split = tl.arange(0, SPLITS_BLOCK)
    every = tl.load(peaks + entry * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    present = tl.load(sums + entry * SPLITS + split, mask=split < SPLITS, other=0.0) != 0.0
    peak = tl.max(every, 0)
    begin = tl.min(tl.where(present, split, SPLITS), 0)
    end = tl.max(tl.where(present, split + 1, 0), 0)
    total = tl.zeros((1,), dtype=tl.float32)
    result = tl.zeros((HEAD_BLOCK,), dtype=tl.float32)
    for s in range(begin, end):
        weight = tl.exp(tl.load(peaks + entry * SPLITS + s) - peak)
        total += weight * tl.load(sums + entry * SPLITS + s)
        result += weight * tl.load(partial + (entry * SPLITS + s) * HEAD_DIM + column, mask=inside, other=0.0)
    tl.store(place, (result / total).to(out.dtype.element_ty), mask=inside)


def paged_attention_triton(
    q: Tensor,
    kv: Tensor,
    batch: ForwardBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    batch_invariant: bool = False,
) -> Tensor:
    """Triton form of `paged_attention`."""
    tokens, heads, head_dim = q.shape
    sequences, kv_heads, page_size = len(batch.kv_lengths), kv.shape[3], kv.shape[2]
    if tokens == 0 or sequences == 0:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    ratio = heads // kv_heads
    ratio_block = triton.next_power_of_2(ratio)
    head_block = max(16, triton.next_power_of_2(head_dim))
    one_token = batch.max_query_length <= 1
    wide = q.dtype == torch.float32
    rows = max(16, ratio_block)
    splits, split = 1, _SPLIT
    if batch_invariant:
        split = _INVARIANT_SPLIT
        splits = triton.next_power_of_2(triton.cdiv(batch.max_kv_length, split))
    elif one_token:
        split = max(_SPLIT, triton.next_power_of_2(triton.cdiv(batch.max_kv_length, _MAX_SPLITS)))
        splits = triton.next_power_of_2(triton.cdiv(batch.max_kv_length, split))
    else:
        rows = max(rows, 16 if wide else 32 if head_block > 128 else 64)
    tile = 1 if one_token else rows // ratio_block
    tiles = sequences if one_token else min(tokens, triton.cdiv(tokens, tile) + sequences)
    # Tiles cover the sequences' tokens only; rows past them are zeroed here or by `_combine`.
    out = (torch.zeros if splits == 1 else torch.empty)(q.shape, dtype=q.dtype, device=q.device)
    partial, stats = out, None
    if splits > 1:
        partial = torch.empty((tokens, heads, splits, head_dim), dtype=torch.float32, device=q.device)
        stats = torch.empty((2, tokens, heads, splits), dtype=torch.float32, device=q.device)
    _attend[(tiles, kv_heads, splits)](
        q,
        kv,
        partial,
        None if stats is None else stats[0],
        None if stats is None else stats[1],
        batch.query_starts,
        batch.kv_lengths,
        batch.page_tables,
        sequences,
        batch.page_tables.stride(0),
        q.stride(0),
        q.stride(1),
        scale,
        1.0 if softcap is None else softcap,
        0 if window is None else window,
        HEADS=heads,
        KV_HEADS=kv_heads,
        RATIO=ratio,
        RATIO_BLOCK=ratio_block,
        HEAD_DIM=head_dim,
        HEAD_BLOCK=head_block,
        PAGE=page_size,
        TOKENS=tile,
        ROWS=rows,
        BLOCK=16 if wide else 32 if head_block > 128 else 64,
        SPLITS=splits,
        SPLIT=split,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        ONE_TOKEN=one_token,
        SEQUENCES_BLOCK=triton.next_power_of_2(sequences),
        num_warps=4,
        num_stages=1 if wide else 2,
        **launch_options(),
    )
    if stats is not None:
        _combine[(tokens, heads)](
            partial,
            stats[0],
            stats[1],
            batch.query_starts,
            out,
            sequences,
            HEADS=heads,
            HEAD_DIM=head_dim,
            HEAD_BLOCK=head_block,
            SPLITS=splits,
            SPLITS_BLOCK=triton.next_power_of_2(splits),
            num_warps=1 if head_block <= 128 else 2,
            **launch_options(),
        )
    return out
