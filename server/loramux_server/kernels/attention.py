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

from torch import Tensor, bfloat16, float16, float32

from loramux_server.kernels.attention_torch import paged_attention_torch
from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.capability import use_triton

__all__ = ["paged_attention", "paged_attention_torch"]


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


def _unsupported(q: Tensor, kv: Tensor) -> str | None:
    """Name what the Triton form cannot take, None if nothing."""
    if q.dtype not in (float32, bfloat16, float16) or q.dtype != kv.dtype:
        return f"dtypes {q.dtype} and {kv.dtype}"
    if q.shape[-1] > 256:
        return f"head dimension {q.shape[-1]}"
    if q.stride(-1) != 1:
        return "head dimension is not contiguous"
    return None
