"""Attention of a packed batch over the paged KV cache.

`paged_attention(q [T, Hq, D], kv [pages, 2, page, Hkv, D], batch, *, scale, window, softcap)` returns `[T, Hq, D]`.

Token i of sequence s sits at absolute position `p = kv_lengths[s] - query_length[s] + i` and attends to positions
`[max(0, p - window + 1), p]` of that sequence (`window=None`: all up to p), found through `page_tables[s]`. Scores are
`scale * q . k`, passed through `softcap * tanh(score / softcap)` if a cap is given; softmax and sums are float32. Query
heads `[h * G, (h + 1) * G)` share KV head h, `G = Hq / Hkv`.

Masked: cache positions at or past the length, past the query, before the window, and page 0. They are never part of a
result, even if they hold NaN. Sequences with no query tokens give nothing; rows of q past the last sequence give zeros.

Batch invariance: the cache is cut into blocks of fixed size at fixed absolute positions, block results are combined in
ascending order, and products are padded to row counts whose bits do not depend on the other rows. A token's output is
therefore the same bits whatever shares the batch, and whether its prompt was prefilled at once, in chunks, or
recomputed. On CPU this is the only form. `batch_invariant` matters on CUDA only.
"""

from torch import Tensor, bfloat16, dtype, float16, float32

from loramux_server.kernels.attention_torch import paged_attention_torch
from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.capability import use_triton

__all__ = ["paged_attention", "paged_attention_torch", "unsupported"]

_MAX_HEAD_DIM = 256
# Elements of the smallest tile of queries, which stays in shared memory: the query heads of one KV head.
_MAX_TILE = 128 * 128


def paged_attention(
    q: Tensor,
    kv: Tensor,
    batch: ForwardBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    batch_invariant: bool = False,
) -> Tensor:
    """Attend the packed queries to their sequences' cached keys and values.

    Args:
        q: `[T, Hq, D]`, rotated.
        kv: `[pages, 2, page, Hkv, D]`, this step's keys and values already written.
        batch: Sequence boundaries, lengths and page tables.
        scale: Multiplies the scores.
        window: Positions a token sees, its own included; None = all.
        softcap: Soft cap of the scores; None = none.
        batch_invariant: Make the bits of a token's output independent of the rest of the batch on CUDA too.

    Returns:
        `[T, Hq, D]` in q's dtype, contiguous.
    """
    if use_triton(q, "paged_attention", _unsupported(q, kv)):
        from loramux_server.kernels.attention_triton import paged_attention_triton

        return paged_attention_triton(
            q, kv, batch, scale=scale, window=window, softcap=softcap, batch_invariant=batch_invariant
        )
    return paged_attention_torch(q, kv, batch, scale=scale, window=window, softcap=softcap)


def unsupported(kind: dtype, *, heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Name what of a shape the Triton form cannot take, None if nothing.

    Args:
        kind: Dtype of queries and cache.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Width of a head.
    """
    if kind not in (float32, bfloat16, float16):
        return f"dtype {kind}"
    if head_dim > _MAX_HEAD_DIM:
        return f"head dimension {head_dim} is over {_MAX_HEAD_DIM}"
    ratio = heads // kv_heads
    if _power_of_two(ratio) * _power_of_two(head_dim) > _MAX_TILE:
        return f"{ratio} query heads a KV head at head dimension {head_dim} are more than a tile holds"
    return None


def _unsupported(q: Tensor, kv: Tensor) -> str | None:
    """What of a call the Triton form cannot take."""
    if q.dtype != kv.dtype:
        return f"dtypes {q.dtype} and {kv.dtype}"
    if q.stride(-1) != 1:
        return "head dimension is not contiguous"
    return unsupported(q.dtype, heads=q.shape[1], kv_heads=kv.shape[3], head_dim=q.shape[2])


def _power_of_two(value: int) -> int:
    """The power of two at or above a positive number."""
    return 1 << (value - 1).bit_length()
