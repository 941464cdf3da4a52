"""Low-rank updates of one linear group for a batch that mixes adapters.

`lora_add(x [T, K], out [T, N], group, batch)` does in place, for every token t with a slot >= 0 and every slice s,

    out[t, columns of s] += scale[slot, s] * (x[t] @ A[s].T) @ B[:, columns of s]

over the rank rows `[first, first + rank[slot, s])` of the slab. Products and scaling are float32, the sum is rounded
once to out's dtype. x and out share a floating dtype (float32, bfloat16, float16) with the slab; they may have any row
stride, unit stride in the columns.

Not touched: rows of tokens with slot -1, columns of a slice whose rank is 0. Not read: rank rows past a slice's rank,
free rows, rows of other slots; all of those may hold NaN. A token's result depends on nothing but its own row.

Layout of the work: tokens sorted by slot in segments (`LoraBatch`). Unused segments are empty with slot -1, and
`num_segments` is an upper bound, so a captured CUDA graph stays valid when the mix changes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loramux_server.kernels.batch import LoraBatch, LoraGroup
from loramux_server.kernels.capability import pad_columns, row_multiple, use_triton

MAX_SLICES = 3  # of the Triton form
# With more rows the base product is bound by arithmetic, and a kernel beside it costs more than one after it.
_MOST_BESIDE = 256


def plan_tiles(batch: LoraBatch) -> LoraBatch:
    """The batch with the work list that every `lora_add` of a step shares; itself where no form needs one.

    Args:
        batch: Which slot each token uses.
    """
    if not use_triton(batch.order, "lora_add"):
        return batch
    from loramux_server.kernels.lora_triton import tiles_of

    return dataclasses.replace(batch, tiles=tiles_of(batch))


def lora_linear(x: Tensor, product: Callable[[Tensor], Tensor], group: LoraGroup, batch: LoraBatch) -> Tensor:
    """A base product and each token's low-rank update of it.

    While a CUDA graph of few rows is captured, the first half of the update, which reads A, becomes a branch beside the
    base product: both wait for memory and neither fills the card alone. Without a capture the same kernels run one by
    one, so that a run before it compiles them. Bits equal those of `lora_add`.

    Args:
        x: `[T, K]`, input of the group.
        product: Gives `[T, N]` from x.
        group: Slab of the group.
        batch: Which slot each token uses.

    Returns:
        `[T, N]`.
    """
    if len(x) > _MOST_BESIDE or not use_triton(x, "lora_add", _unlike(x, group)):
        out = product(x)
        lora_add(x, out, group, batch)
        return out
    from loramux_server.kernels.lora_triton import Update

    update = Update(x, group, batch)
    if update.idle:
        return product(x)
    if not torch.cuda.is_current_stream_capturing():
        update.shrink(x, beside=True)
        out = product(x)
    else:
        main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            update.shrink(x, beside=True)
        out = product(x)
        main.wait_stream(side)
    update.expand(out, beside=True)
    return out


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Of the two branches, the short one goes first.
    return torch.cuda.Stream(device, priority=-1)


def lora_add(x: Tensor, out: Tensor, group: LoraGroup, batch: LoraBatch) -> None:
    """Add each token's low-rank update to `out`.

    Args:
        x: `[T, K]`, input of the group.
        out: `[T, N]`, output of the group's base product; updated in place.
        group: Slab of the group.
        batch: Which slot each token uses.
    """
    if use_triton(x, "lora_add", _unsupported(x, out, group)):
        from loramux_server.kernels.lora_triton import lora_add_triton

        lora_add_triton(x, out, group, batch)
    else:
        lora_add_torch(x, out, group, batch)


@dataclasses.dataclass(frozen=True, slots=True)
class _Segment:
    """Tokens of one adapter.

    Attributes:
        slot: Slab slot.
        rows: `[n]` int64 token indices.
        padded: `rows` followed by repeats of its first entry, a multiple of `row_multiple()` long.
        start: First token if the rows are consecutive, else None.
    """

    slot: int
    rows: Tensor
    padded: Tensor
    start: int | None


# Segments of the last batch seen, with the metadata they were made from: a step calls `lora_add` once a group and layer
# with the same batch. Compared by contents, since a batch's tensors may be refilled in place.
_last: tuple[tuple[Tensor, Tensor, Tensor], int, list[_Segment]] | None = None


def lora_add_torch(x: Tensor, out: Tensor, group: LoraGroup, batch: LoraBatch) -> None:
    """Torch form of `lora_add`: a loop over the adapters present."""
    segments = _segments(batch, x.device)
    if not segments:
        return
    first_rows, ranks = group.first_rows.tolist(), group.ranks.tolist()
    for segment in segments:
        rank_of = ranks[segment.slot]
        if not any(rank_of):
            continue
        first, begin = first_rows[segment.slot], 0
        shrunk = _shrink(x.index_select(0, segment.padded).float(), group, segment.slot, first, rank_of)
        for rank, narrow, end in zip(rank_of, shrunk, group.slice_ends, strict=True):
            if narrow is not None:
                delta = narrow @ pad_columns(group.b[first : first + rank, begin:end].float())
                _add_rows(out[:, begin:end], segment, delta[: len(segment.rows), : end - begin])
            begin = end


def _shrink(x: Tensor, group: LoraGroup, slot: int, first: int, ranks: Sequence[int]) -> Sequence[Tensor | None]:
    """Scaled products `[rows, rank]` of a segment's rows with A of each slice, None where the rank is 0."""
    x, scales = pad_columns(x), group.scales[slot]
    if min(ranks) == max(ranks):
        a = pad_columns(group.a[:, first : first + ranks[0]].float())
        return torch.bmm(x.expand(len(a), -1, -1), a.transpose(1, 2)).mul_(scales[:, None, None]).unbind()
    return [
        (x @ pad_columns(group.a[s, first : first + rank].float()).t()).mul_(scales[s]) if rank else None
        for s, rank in enumerate(ranks)
    ]


def _add_rows(out: Tensor, segment: _Segment, delta: Tensor) -> None:
    """Add `delta [n, columns]` float32 to the segment's rows of out, rounding the sum once."""
    if segment.start is None and out.dtype == torch.float32:
        out.index_add_(0, segment.rows, delta)
    elif segment.start is None:
        out.index_copy_(0, segment.rows, (out.index_select(0, segment.rows).float() + delta).to(out.dtype))
    elif out.dtype == torch.float32:
        out[segment.start : segment.start + len(delta)].add_(delta)
    else:
        view = out[segment.start : segment.start + len(delta)]
        view.copy_(view.float() + delta)


def _segments(batch: LoraBatch, device: torch.device) -> list[_Segment]:
    """Adapter segments of a batch, from the last call if its contents are the same."""
    global _last  # noqa: PLW0603
    key = (batch.segment_slots, batch.segment_starts, batch.order)
    multiple = row_multiple()
    last = _last
    if (
        last is not None
        and last[1] == multiple
        and all(a.device == b.device and torch.equal(a, b) for a, b in zip(last[0], key, strict=True))
    ):
        return last[2]
    starts = batch.segment_starts.tolist()
    segments = []
    for g, slot in enumerate(batch.segment_slots.tolist()):
        begin, end = starts[g], starts[g + 1]
        if slot < 0 or begin == end:
            continue
        rows = batch.order[begin:end].long()
        padding = -(end - begin) % multiple
        padded = torch.cat((rows, rows[:1].expand(padding))) if padding else rows
        numbers = rows.tolist()
        consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        segments.append(_Segment(slot, rows, padded.to(device), numbers[0] if consecutive else None))
    _last = ((key[0].clone(), key[1].clone(), key[2].clone()), multiple, segments)
    return segments


def unsupported(kind: torch.dtype, group: LoraGroup) -> str | None:
    """Name what of a group's shape the Triton form cannot take, None if nothing.

    Args:
        kind: Dtype of the group's input and output.
        group: Slab of the group.
    """
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {kind}"
    if len({kind, group.a.dtype, group.b.dtype}) != 1:
        return f"operands of dtypes {kind}, {group.a.dtype} and {group.b.dtype}"
    if len(group.slice_ends) > MAX_SLICES:
        return f"{len(group.slice_ends)} slices are more than {MAX_SLICES}"
    if not (group.a.is_contiguous() and group.b.is_contiguous()):
        return "the slab is not contiguous"
    return None


def _unsupported(x: Tensor, out: Tensor, group: LoraGroup) -> str | None:
    """Name what the Triton form cannot take, None if nothing."""
    if out.dtype != x.dtype:
        return f"operands of dtypes {x.dtype} and {out.dtype}"
    if out.stride(-1) != 1:
        return "columns are not contiguous"
    return _unlike(x, group)


def _unlike(x: Tensor, group: LoraGroup) -> str | None:
    """What `_unsupported` can tell before there is an output, which has x's dtype and is contiguous."""
    return "columns are not contiguous" if x.stride(-1) != 1 else unsupported(x.dtype, group)
