"""Inputs and naive references of the kernel tests, shared by the torch, interpreter and CUDA tests.

References are float64, dense, one token at a time, and written apart from the kernels' code.
"""

import dataclasses
import math
from typing import TypeVar

import torch
from torch import Tensor

from loramux_server.kernels.batch import ForwardBatch, LoraBatch, LoraGroup

NAN = float("nan")

# Largest difference from the float64 reference, over the largest magnitude of the reference.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, label: str = "", slack: float = 1.0) -> float:
    """Compare with `slack` times the tolerance of a dtype and report the error; no NaN passes."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    wide = actual.detach().double().cpu()
    reference = expected.double().cpu()
    assert wide.shape == reference.shape
    assert torch.isfinite(wide).all(), f"{label}: non-finite values"
    error = ((wide - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()
    print(f"{label} {dtype}: max relative error {error:.2e}")
    bound = slack * TOLERANCE[dtype]
    assert error <= bound, f"{label}: {error:.3e} > {bound:.1e}"
    return error


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Sequences `(query tokens, KV length)` and the shape of one attention call."""

    name: str
    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    page_size: int = 16
    window: int | None = None
    softcap: float | None = None
    extra_tokens: int = 0


ATTENTION_CASES = (
    AttentionCase(name="decode", sequences=((1, 1), (1, 16), (1, 17), (1, 130), (1, 300))),
    AttentionCase(name="mixed", sequences=((1, 40), (7, 7), (1, 5), (33, 150), (0, 0), (20, 20)), extra_tokens=3),
    AttentionCase(name="empty rows between", sequences=((0, 0), (1, 9), (0, 0), (3, 5), (0, 0)), extra_tokens=2),
    AttentionCase(name="mqa 128", sequences=((1, 70), (9, 41)), heads=(5, 1), head_dim=128),
    AttentionCase(name="mha 96", sequences=((1, 33), (6, 18)), heads=(3, 3), head_dim=96),
    AttentionCase(name="ratio 7", sequences=((1, 140), (12, 31)), heads=(14, 2), page_size=32),
    AttentionCase(name="head 256 softcap", sequences=((1, 20), (5, 23)), heads=(2, 1), head_dim=256, softcap=5.0),
    AttentionCase(name="window", sequences=((1, 200), (30, 170), (1, 3), (8, 8)), window=20),
    AttentionCase(name="window 1", sequences=((1, 33), (4, 6)), window=1),
    AttentionCase(name="window over blocks", sequences=((1, 400), (1, 129), (40, 290)), window=130, softcap=30.0),
    AttentionCase(name="small head", sequences=((1, 18), (4, 11)), heads=(4, 2), head_dim=16, page_size=4),
    AttentionCase(name="odd head", sequences=((1, 18), (4, 11)), heads=(4, 2), head_dim=20, page_size=8),
)


def attention_inputs(
    case: AttentionCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, ForwardBatch]:
    """Random queries, a cache with NaN wherever no sequence has a token, and the batch."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = case.heads
    size = case.page_size
    tokens = sum(count for count, _ in case.sequences) + case.extra_tokens
    needed = [-(-length // size) for _, length in case.sequences]
    pages = sum(needed) + 4
    numbers = (torch.randperm(pages - 1, generator=generator) + 1).tolist()
    kv = torch.full((pages, 2, size, kv_heads, case.head_dim), NAN, dtype=dtype)
    table = torch.zeros((len(case.sequences), max(needed) + 1), dtype=torch.int32)
    for s, (_, length) in enumerate(case.sequences):
        for j in range(needed[s]):
            table[s, j] = page = numbers.pop()
            used = min(size, length - j * size)
            kv[page, :, :used] = torch.randn((2, used, kv_heads, case.head_dim), generator=generator).to(dtype)
    q = torch.randn((tokens, heads, case.head_dim), generator=generator).to(dtype)
    batch = forward_batch(case.sequences, table, size, tokens)
    return q.to(device), kv.to(device), to_device(batch, device)


def forward_batch(sequences: tuple[tuple[int, int], ...], table: Tensor, page_size: int, tokens: int) -> ForwardBatch:
    """The batch of sequences `(query tokens, KV length)` with given page tables; padded to `tokens` rows."""
    starts, positions, slots = [0], [], []
    for s, (count, length) in enumerate(sequences):
        starts.append(starts[-1] + count)
        for p in range(length - count, length):
            positions.append(p)
            slots.append(int(table[s, p // page_size]) * page_size + p % page_size)
    padding = [0] * (tokens - len(positions))
    return ForwardBatch(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.tensor(positions + padding, dtype=torch.int64),
        kv_slots=torch.tensor(slots + padding, dtype=torch.int64),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        kv_lengths=torch.tensor([length for _, length in sequences], dtype=torch.int32),
        page_tables=table,
        logit_rows=torch.zeros(0, dtype=torch.int64),
        lora=None,
        max_query_length=max(count for count, _ in sequences),
        max_kv_length=max(length for _, length in sequences),
        page_size=page_size,
    )


T = TypeVar("T", ForwardBatch, LoraBatch, LoraGroup)


def to_device(value: T, device: str) -> T:
    """Move every tensor of a batch or group."""
    moved = {
        f.name: getattr(value, f.name).to(device)
        for f in dataclasses.fields(value)
        if isinstance(getattr(value, f.name), Tensor)
    }
    return dataclasses.replace(value, **moved)


def naive_attention(q: Tensor, kv: Tensor, batch: ForwardBatch, case: AttentionCase) -> Tensor:
    """Attention token by token, in float64."""
    q, kv = q.double().cpu(), kv.double().cpu()
    heads, kv_heads = case.heads
    scale = case.head_dim**-0.5
    out = torch.zeros_like(q)
    start = 0
    for s, (count, length) in enumerate(case.sequences):
        table = batch.page_tables[s].tolist()
        for i in range(count):
            p = length - count + i
            low = 0 if case.window is None else max(0, p - case.window + 1)
            seen = [(table[j // case.page_size], j % case.page_size) for j in range(low, p + 1)]
            k = torch.stack([kv[page, 0, offset] for page, offset in seen])
            v = torch.stack([kv[page, 1, offset] for page, offset in seen])
            for h in range(heads):
                group = h // (heads // kv_heads)
                score = (k[:, group] @ q[start + i, h]) * scale
                if case.softcap is not None:
                    score = case.softcap * torch.tanh(score / case.softcap)
                out[start + i, h] = torch.softmax(score, 0) @ v[:, group]
        start += count
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraCase:
    """Adapters `rank of each slice` by slot, and the slot of every token."""

    name: str
    ranks: tuple[tuple[int, ...], ...]
    token_slots: tuple[int, ...]
    width: int = 64
    slices: tuple[int, ...] = (48, 16, 16)
    spare_segments: int = 3


LORA_CASES = (
    LoraCase(name="base only", ranks=((8, 8, 8),), token_slots=(-1,) * 5),
    LoraCase(name="one adapter", ranks=((8, 8, 8),), token_slots=(0,) * 9),
    LoraCase(name="mixed", ranks=((8, 16, 3), (1, 5, 16), (16, 16, 16)), token_slots=(2, -1, 0, 0, 1, 2, -1, 1, 0, 0)),
    LoraCase(name="absent modules", ranks=((0, 8, 0), (4, 0, 4), (0, 0, 0)), token_slots=(0, 1, 2, -1, 1, 0, 2, 2)),
    LoraCase(name="large ranks", ranks=((33, 64, 17), (128, 7, 0)), token_slots=(1, 0) * 9 + (-1,)),
    LoraCase(name="one slice", ranks=((16,), (5,), (2,)), token_slots=(0, 1, 1, 2, -1, 0), slices=(80,)),
    LoraCase(
        name="uneven widths", ranks=((6, 9), (11, 2)), token_slots=(1,) * 40 + (0,) * 37, width=50, slices=(37, 70)
    ),
    LoraCase(
        name="long segments", ranks=((8, 8), (16, 12)), token_slots=(0,) * 50 + (1,) * 40 + (-1,), slices=(24, 40)
    ),
)


def lora_inputs(
    case: LoraCase, dtype: torch.dtype, device: str = "cpu", seed: int = 0, spread: int = 1
) -> tuple[Tensor, Tensor, LoraGroup, LoraBatch]:
    """x, out, a slab with NaN in every row that no adapter owns, and the batch.

    Args:
        case: Shapes.
        dtype: Of x, out and the slab.
        device: Where all tensors go.
        seed: Of the random numbers.
        spread: Free units of 16 rows between adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    slots, total = len(case.ranks), sum(case.slices)
    units = [-(-max(ranks) // 16) for ranks in case.ranks]
    first, row = [], 16 * spread
    for slot in reversed(range(slots)):
        first.append(row)
        row += 16 * (units[slot] + spread)
    first.reverse()
    a = torch.full((len(case.slices), row, case.width), NAN, dtype=dtype)
    b = torch.full((row, total), NAN, dtype=dtype)
    for slot, ranks in enumerate(case.ranks):
        begin = 0
        for s, rank in enumerate(ranks):
            end = begin + case.slices[s]
            rows = slice(first[slot], first[slot] + rank)
            a[s, rows] = (torch.randn((rank, case.width), generator=generator) / math.sqrt(case.width)).to(dtype)
            b[rows, begin:end] = torch.randn((rank, end - begin), generator=generator).to(dtype)
            begin = end
    group = LoraGroup(
        a=a,
        b=b,
        slice_ends=tuple(sum(case.slices[: s + 1]) for s in range(len(case.slices))),
        first_rows=torch.tensor(first, dtype=torch.int32),
        ranks=torch.tensor(case.ranks, dtype=torch.int32),
        scales=torch.rand((slots, len(case.slices)), generator=generator) + 0.25,
        max_rank=max(max(ranks) for ranks in case.ranks),
    )
    tokens = len(case.token_slots)
    x = torch.randn((tokens, case.width), generator=generator).to(dtype)
    out = torch.randn((tokens, total), generator=generator).to(dtype)
    batch = lora_batch(case.token_slots, case.spare_segments)
    return x.to(device), out.to(device), to_device(group, device), to_device(batch, device)


def lora_batch(token_slots: tuple[int, ...], spare_segments: int = 0) -> LoraBatch:
    """Sorted order and segments of a slot assignment, with unused segments at the end."""
    order = sorted(range(len(token_slots)), key=lambda t: token_slots[t])
    used = sorted(set(token_slots))
    starts = [0]
    for slot in used:
        starts.append(starts[-1] + token_slots.count(slot))
    return LoraBatch(
        token_slots=torch.tensor(token_slots, dtype=torch.int32),
        order=torch.tensor(order, dtype=torch.int32),
        segment_slots=torch.tensor(used + [-1] * spare_segments, dtype=torch.int32),
        segment_starts=torch.tensor(starts + [len(order)] * spare_segments, dtype=torch.int32),
        num_segments=len(used) + spare_segments,
    )


def naive_lora(x: Tensor, out: Tensor, group: LoraGroup, token_slots: tuple[int, ...]) -> Tensor:
    """Updates token by token, in float64."""
    x, result = x.double().cpu(), out.double().cpu().clone()
    a, b = group.a.double().cpu(), group.b.double().cpu()
    for t, slot in enumerate(token_slots):
        if slot < 0:
            continue
        begin, first = 0, int(group.first_rows[slot])
        for s, end in enumerate(group.slice_ends):
            rows = slice(first, first + int(group.ranks[slot, s]))
            result[t, begin:end] += float(group.scales[slot, s]) * (x[t] @ a[s, rows].T) @ b[rows, begin:end]
            begin = end
    return result


def rope_table(positions: int, rotary: int) -> Tensor:
    """Cosines and sines `[positions, 2, rotary / 2]`."""
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.stack((angles.cos(), angles.sin()), 1).float()


def naive_rope(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Half-rotation written with rotate_half, in float64."""
    rotary = 2 * table.shape[-1]
    x, entries = x.double().cpu(), table.double().cpu()[positions.cpu()]
    cos, sin = entries[:, None, 0].repeat(1, 1, 2), entries[:, None, 1].repeat(1, 1, 2)
    head = x[..., :rotary]
    turned = torch.cat((-head[..., rotary // 2 :], head[..., : rotary // 2]), -1)
    return torch.cat((head * cos + turned * sin, x[..., rotary:]), -1)
