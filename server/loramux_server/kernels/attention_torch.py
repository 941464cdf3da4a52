"""Torch form of `attention`, the one that serves on CPU.

A batch is turned into a work list once, and the list is kept for the other layers of the step: sequences with one query
token are flattened into fixed blocks of cache positions and attended in one batched product, the others go tile by
tile. Both cut the cache at the same absolute positions, take the maximum over all of a token's scores (exact in any
order) and add the blocks in ascending order, so that a token's bits are the same either way.
"""

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.capability import pad_columns, row_multiple

_BLOCK = 64
_GATHER_ELEMENTS = 1 << 24  # bounds the copy of a decode group's keys and values: 64 MiB
_SCORE_ELEMENTS = 1 << 20  # a tile's scores stay near the cache: 4 MiB
_MAX_TILE = 128
_LOWEST_EXPONENT = -80.0  # exp of less leaves the normal numbers, where it is several times slower


def paged_attention_torch(
    q: Tensor,
    kv: Tensor,
    batch: ForwardBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    batch_invariant: bool = True,
) -> Tensor:
    """Torch form of `paged_attention`; always batch invariant on CPU, whatever `batch_invariant`."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    scores = _Scores(scale=scale, window=window, softcap=softcap)
    plan = _plan(batch, kv.shape, window)
    for group in plan.decodes:
        _attend_decodes(q, kv, group, scores, out)
    for sequence in plan.prefills:
        _attend_prefill(q, kv, sequence, scores, out)
    return out


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Scores:
    """How a score is formed from scaled queries and what it may see."""

    scale: float
    window: int | None
    softcap: float | None

    def cap(self, products: Tensor) -> Tensor:
        """Cap products in place."""
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products


@dataclasses.dataclass(frozen=True, slots=True)
class _Mask:
    """What scores may not see: added before the maximum is taken, multiplied after the exponential.

    Attributes:
        bias: 0 or minus infinity.
        visible: 1 or 0.
    """

    bias: Tensor
    visible: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> Self:
        """The mask that hides where `hidden` is True."""
        bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return cls(bias, (~hidden).float())


@dataclasses.dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one query token each, flattened into KV blocks.

    Attributes:
        tokens: `[n]` int64, packed row of each sequence.
        rows: `[2 * blocks * Hkv * _BLOCK]` cache rows (k of all blocks, then v), invisible positions redirected.
        owner: `[blocks]` int64, index into `tokens`; ascending.
        blocks_of: `[n, max blocks]` int64, block numbers of each sequence, padded with `blocks`.
        mask: `[blocks, 1, 1, _BLOCK]`.
    """

    tokens: Tensor
    rows: Tensor
    owner: Tensor
    blocks_of: Tensor
    mask: _Mask


@dataclasses.dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence with several query tokens.

    Attributes:
        start: First packed row.
        count: Query tokens.
        position: Absolute position of the first.
        first_block: First KV block any of them sees.
        rows: As in `_Decodes`, for the blocks from `first_block` on.
    """

    start: int
    count: int
    position: int
    first_block: int
    rows: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """Work list of one batch; depends on lengths, tables, cache shape and window only."""

    key: tuple[Tensor, Tensor, Tensor]
    shape: tuple[int, ...]
    window: int | None
    threads: int
    decodes: Sequence[_Decodes]
    prefills: Sequence[_Prefill]

    def fits(self, key: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...], window: int | None) -> bool:
        """Tell whether the plan was made for these contents."""
        return (
            self.window == window
            and self.shape == shape
            and self.threads == row_multiple()
            and all(a.device == b.device and torch.equal(a, b) for a, b in zip(self.key, key, strict=True))
        )


# Plans of the last batch, one for each of two windows (models that alternate local and global layers). Compared by
# contents, since a batch's tensors may be refilled in place.
_plans: tuple[_Plan, ...] = ()


def _plan(batch: ForwardBatch, kv_shape: torch.Size, window: int | None) -> _Plan:
    """The work list of a batch, kept between the layers of a step."""
    global _plans  # noqa: PLW0603
    key = (batch.query_starts, batch.kv_lengths, batch.page_tables)
    shape = tuple(kv_shape[2:])
    for plan in _plans:
        if plan.fits(key, shape, window):
            return plan
    plan = _make_plan(batch, shape, window)
    _plans = (plan, *_plans[:1])
    return plan


def _make_plan(batch: ForwardBatch, shape: tuple[int, ...], window: int | None) -> _Plan:
    """Cut a batch into decode groups of bounded size and prefill sequences."""
    page_size, heads, head_dim = shape
    starts, lengths = batch.query_starts.tolist(), batch.kv_lengths.tolist()
    budget = max(1, _GATHER_ELEMENTS // (2 * _BLOCK * heads * head_dim))
    prefills: list[_Prefill] = []
    groups: list[list[tuple[int, int, int, int]]] = []
    used = budget
    for s, length in enumerate(lengths):
        count = starts[s + 1] - starts[s]
        if count <= 0 or length <= 0:
            continue
        position = length - count
        lowest = 0 if window is None else max(0, position - window + 1)
        first_block, end_block = lowest // _BLOCK, -(-length // _BLOCK)
        if count > 1:
            blocks = torch.arange(first_block, end_block, device=batch.page_tables.device)
            rows, _ = _cache_rows(batch.page_tables[s], 0, blocks, lowest, length, page_size, heads)
            prefills.append(_Prefill(starts[s], count, position, first_block, rows))
            continue
        if used + end_block - first_block > budget:
            groups.append([])
            used = 0
        groups[-1].append((s, lowest, first_block, end_block))
        used += end_block - first_block
    decodes = [_make_decodes(batch, group, page_size, heads) for group in groups]
    copies = (batch.query_starts.clone(), batch.kv_lengths.clone(), batch.page_tables.clone())
    return _Plan(copies, shape, window, row_multiple(), decodes, prefills)


def _make_decodes(
    batch: ForwardBatch, group: Sequence[tuple[int, int, int, int]], page_size: int, heads: int
) -> _Decodes:
    """Flatten single-token sequences `(sequence, lowest visible, first block, end block)` into blocks."""
    device, width = batch.page_tables.device, batch.page_tables.shape[1]
    sequences, lowest, first, end = torch.tensor(group, device=device).unbind(1)
    counts = end - first
    total, widest = sum(e - f for _, _, f, e in group), max(e - f for _, _, f, e in group)
    begins = counts.cumsum(0) - counts
    owner = torch.repeat_interleave(counts, output_size=total)
    number = torch.arange(widest, device=device)
    rows, hidden = _cache_rows(
        batch.page_tables.reshape(-1),
        (sequences * width)[owner, None],
        torch.arange(total, device=device) + (first - begins)[owner],
        lowest[owner, None],
        batch.kv_lengths.long()[sequences][owner, None],
        page_size,
        heads,
    )
    return _Decodes(
        tokens=batch.query_starts.long()[sequences],
        rows=rows,
        owner=owner,
        blocks_of=torch.where(number < counts[:, None], begins[:, None] + number, total),
        mask=_Mask.of(hidden.view(total, 1, 1, _BLOCK)),
    )


def _cache_rows(
    pages: Tensor,
    begin: Tensor | int,
    blocks: Tensor,
    lowest: Tensor | int,
    length: Tensor | int,
    page_size: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Rows of the cache, seen as `[pages * 2 * page * Hkv, D]`, of some blocks.

    Positions that no query of the sequence sees are redirected to its last position: finite numbers that get weight 0
    (a NaN would survive the product with 0).

    Args:
        pages: Page numbers of one or all sequences, flat.
        begin: Where in them those of the block's sequence begin; a number or `[n, 1]`, like `lowest` and `length`.
        blocks: `[n]` block numbers.
        lowest: First position that is seen.
        length: Positions of the sequence.
        page_size: Tokens a page.
        heads: Hkv.

    Returns:
        `[2 * n * Hkv * _BLOCK]` int64, ordered key or value, block, head, position; and `[n, _BLOCK]`, whether a
        position is not seen.
    """
    positions = blocks[:, None] * _BLOCK + torch.arange(_BLOCK, device=pages.device)
    hidden = (positions < lowest) | (positions >= length)
    positions = torch.where(hidden, length - 1, positions)
    page = pages[begin + torch.div(positions, page_size, rounding_mode="floor")].long()
    row = (page * 2 * page_size + positions % page_size) * heads
    keys = (row[:, None] + torch.arange(heads, device=pages.device)[:, None]).view(-1)
    return torch.cat((keys, keys + page_size * heads)), hidden


def _gather(kv: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of blocks as `[blocks, Hkv, _BLOCK, D]` float32, D padded to a multiple of 16."""
    heads, head_dim = kv.shape[3:]
    gathered = pad_columns(kv.view(-1, head_dim).index_select(0, rows).float())
    keys, values = gathered.view(2, -1, heads, _BLOCK, gathered.shape[-1])
    return keys, values


def _attend_decodes(q: Tensor, kv: Tensor, group: _Decodes, scores: _Scores, out: Tensor) -> None:
    """Attend single-token sequences, all their blocks in one batched product."""
    heads, head_dim = kv.shape[3:]
    count, ratio, blocks = len(group.tokens), q.shape[1] // heads, len(group.owner)
    keys, values = _gather(kv, group.rows)
    width = keys.shape[-1]
    padded = -(-ratio // row_multiple()) * row_multiple()
    queries = torch.zeros((count, heads, padded, width), dtype=torch.float32, device=q.device)
    queries[:, :, :ratio, :head_dim] = q.index_select(0, group.tokens).view(count, heads, ratio, head_dim)
    queries.mul_(scores.scale)
    flat = (blocks * heads, -1, width)
    products = torch.bmm(queries.index_select(0, group.owner).view(flat), keys.view(flat).transpose(1, 2))
    weights = scores.cap(products).view(blocks, heads, padded, _BLOCK)
    weights.add_(group.mask.bias)
    peaks = weights.amax(-1)
    lowest = torch.full((1, heads, padded), -torch.inf, device=q.device)
    peak = torch.cat((peaks, lowest))[group.blocks_of].amax(1)
    weights.sub_(peak.index_select(0, group.owner)[..., None]).clamp_min_(_LOWEST_EXPONENT).exp_()
    weights.mul_(group.mask.visible)
    sums = weights.sum(-1)
    partial = torch.bmm(weights.view(blocks * heads, padded, _BLOCK), values.view(flat))
    total = torch.zeros((count, heads, padded), device=q.device).index_add_(0, group.owner, sums)
    result = torch.zeros_like(queries).index_add_(0, group.owner, partial.view(blocks, heads, padded, width))
    result = result[:, :, :ratio, :head_dim] / total[:, :, :ratio, None]
    out.index_copy_(0, group.tokens, result.reshape(count, -1, head_dim).to(out.dtype))


def _attend_prefill(q: Tensor, kv: Tensor, sequence: _Prefill, scores: _Scores, out: Tensor) -> None:
    """Attend one sequence in tiles of query tokens, each over the blocks that it sees."""
    heads, head_dim = kv.shape[3:]
    ratio = q.shape[1] // heads
    keys, values = _gather(kv, sequence.rows)
    tile = max(1, min(_MAX_TILE, _SCORE_ELEMENTS // (len(keys) * q.shape[1] * _BLOCK)))
    for begin in range(0, sequence.count, tile):
        count = min(tile, sequence.count - begin)
        position = sequence.position + begin
        lowest = 0 if scores.window is None else max(0, position - scores.window + 1)
        first, end = lowest // _BLOCK, (position + count - 1) // _BLOCK + 1
        used = slice(first - sequence.first_block, end - sequence.first_block)
        where = slice(sequence.start + begin, sequence.start + begin + count)
        rows = -(-count * ratio // row_multiple()) * row_multiple()
        queries = torch.zeros((heads, rows, keys.shape[-1]), dtype=torch.float32, device=q.device)
        queries[:, : count * ratio, :head_dim].unflatten(1, (count, ratio)).copy_(
            q[where].unflatten(1, (heads, ratio)).transpose(0, 1)
        )
        queries.mul_(scores.scale)
        mask = _tile_mask(position, count, first, end, scores.window, q.device)
        result = _attend_tile(queries, keys[used], values[used], mask, ratio, scores)
        visible = result[:, : count * ratio, :head_dim].unflatten(1, (count, ratio)).transpose(0, 1)
        out[where].unflatten(1, (heads, ratio)).copy_(visible)


def _tile_mask(position: int, count: int, first: int, end: int, window: int | None, device: torch.device) -> _Mask:
    """Mask `[blocks, 1, count, 1, _BLOCK]` of a tile of queries that starts at a position.

    Leading blocks that every query of the tile sees whole are left out.
    """
    if window is None:
        first = max(first, (position + 1) // _BLOCK)
    at = torch.arange(position, position + count, device=device).view(-1, 1, 1)
    of = torch.arange(first * _BLOCK, end * _BLOCK, device=device).view(-1, 1, 1, 1, _BLOCK)
    hidden = of > at
    return _Mask.of(hidden if window is None else hidden | (of <= at - window))


def _attend_tile(queries: Tensor, keys: Tensor, values: Tensor, mask: _Mask, ratio: int, scores: _Scores) -> Tensor:
    """Attention of `[Hkv, rows, D]` queries over `[blocks, Hkv, _BLOCK, D]`; returns `[Hkv, rows, D]`."""
    heads, rows, _ = queries.shape
    blocks, (masked, _, count, _, _) = len(keys), mask.bias.shape
    weights = torch.empty((blocks, heads, rows, _BLOCK), device=queries.device)
    for b in range(blocks):
        torch.bmm(queries, keys[b].transpose(1, 2), out=weights[b])
    scores.cap(weights)
    partly = weights[blocks - masked :, :, : count * ratio].unflatten(2, (count, ratio))
    partly.add_(mask.bias)
    weights.sub_(weights.amax(dim=(0, 3))[None, :, :, None]).clamp_min_(_LOWEST_EXPONENT).exp_()
    partly.mul_(mask.visible)
    sums = weights.sum(-1)
    total, result = sums[0], torch.bmm(weights[0], values[0])
    for b in range(1, blocks):
        total += sums[b]
        result += torch.bmm(weights[b], values[b])
    return result / total[..., None]
