"""Tensors of one forward pass: what the runner fills and model and kernels read.

T = packed tokens, S = sequences (rows of the plan), P = pages a table row, R = rows whose logits are wanted.
All live on the model's device. On CUDA they are views of static buffers, so that a captured graph sees new contents.
"""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraBatch:
    """Which slab slot each packed token uses.

    Attributes:
        token_slots: `[T]` int32, slot of each token, -1 = base model.
        order: `[T]` int32, token indices stably sorted by slot (base rows first).
        segment_slots: `[G]` int32, slot of each segment of `order`; unused entries are -1.
        segment_starts: `[G + 1]` int32, segment g is `order[starts[g]:starts[g + 1]]`; unused segments are empty.
        num_segments: Host count of used segments, base segment included; an upper bound under graph replay.
        tiles: `[tiles, 64]` int32 or None, the work list of the Triton form, made once a step by `lora.plan_tiles`;
            without it, it is made in every call.
    """

    token_slots: Tensor
    order: Tensor
    segment_slots: Tensor
    segment_starts: Tensor
    num_segments: int
    tiles: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One packed batch that mixes chunked prefill and decode.

    Attributes:
        token_ids: `[T]` int64.
        positions: `[T]` int64, position of each token in its sequence.
        kv_slots: `[T]` int64, `page * page_size + offset` where the token's keys and values go; padding: in page 0.
        query_starts: `[S + 1]` int32, tokens of sequence s are `[starts[s], starts[s + 1])`.
        kv_lengths: `[S]` int32, KV length of each sequence after this step's write.
        page_tables: `[S, P]` int32, padded with 0.
        logit_rows: `[R]` int64, packed rows to project to the vocabulary.
        lora: None = every row uses the base model.
        max_query_length: Host upper bound of tokens a sequence in this batch.
        max_kv_length: Host upper bound of `kv_lengths`.
        page_size: Tokens a page.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    query_starts: Tensor
    kv_lengths: Tensor
    page_tables: Tensor
    logit_rows: Tensor
    lora: LoraBatch | None
    max_query_length: int
    max_kv_length: int
    page_size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraGroup:
    """Slab of one linear group of one layer: `out[:, slice s] += scale[slot, s] * (x @ A[s].T) @ B[:, slice s]`.

    R = rank rows of the slab (a multiple of 16), K = input width, N = output width of the fused group. A slot owns the
    same rows `[first_rows[slot], first_rows[slot] + ranks[slot, s])` of every slice; rows past a slice's rank may hold
    anything, NaN included, and must never be read into a result.

    Attributes:
        a: `[slices, R, K]`, rows as in the file (not scaled).
        b: `[R, N]`, B transposed: row j holds, in the columns of slice s, column j of that slice's lora_B.
        slice_ends: End column in N of each slice; slice s begins where s - 1 ends.
        first_rows: `[slots]` int32.
        ranks: `[slots, slices]` int32; 0 = the adapter has no such module.
        scales: `[slots, slices]` float32.
        max_rank: Host upper bound of `ranks`.
    """

    a: Tensor
    b: Tensor
    slice_ends: tuple[int, ...]
    first_rows: Tensor
    ranks: Tensor
    scales: Tensor
    max_rank: int
