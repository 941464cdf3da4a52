# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `rope`: two programs a token, one for the queries and one for keys and values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.overlap_triton import launch_options, wait_for_front


@triton.jit
def _rotate(
    source,
    target,
    head_stride,
    cos,
    sin,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Rotate the heads of one token; `target` is contiguous."""
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    first = tl.load(source + head * head_stride + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + head * head_stride + HALF + column, mask=inside, other=0.0).to(tl.float32)
    place = target + head * HEAD_DIM + column
    tl.store(place, (first * cos - second * sin).to(target.dtype.element_ty), mask=inside)
    tl.store(place + HALF, (second * cos + first * sin).to(target.dtype.element_ty), mask=inside)
    if 2 * HALF < HEAD_DIM:
        rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        passed = (head < HEADS) & (rest < HEAD_DIM)
        kept = tl.load(source + head * head_stride + rest, mask=passed, other=0.0)
        tl.store(target + head * HEAD_DIM + rest, kept.to(target.dtype.element_ty), mask=passed)


@triton.jit
def _rope_and_write(
    q,
    k,
    v,
    cos_sin,
    positions,
    kv_slots,
    out,
    kv,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_HEADS_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
):
    wait_for_front()
    token = tl.program_id(0).to(tl.int64)
    entry = cos_sin + tl.load(positions + token) * (2 * HALF)
    column = tl.arange(0, HALF_BLOCK)
    cos = tl.load(entry + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(entry + HALF + column, mask=column < HALF, other=0.0)[None, :]
    if tl.program_id(1) == 0:
        _rotate(
            q + token * q_stride,
            out + token * (HEADS * HEAD_DIM),
            q_head_stride,
            cos,
            sin,
            HEADS,
            HEADS_BLOCK,
            HEAD_DIM,
            HALF,
            HALF_BLOCK,
            REST_BLOCK,
        )
    else:
        slot = tl.load(kv_slots + token)
        key = kv + ((slot // PAGE) * (2 * PAGE) + slot % PAGE) * (KV_HEADS * HEAD_DIM)
        _rotate(
            k + token * k_stride,
            key,
            k_head_stride,
            cos,
            sin,
            KV_HEADS,
            KV_HEADS_BLOCK,
            HEAD_DIM,
            HALF,
            HALF_BLOCK,
            REST_BLOCK,
        )
        head = tl.arange(0, KV_HEADS_BLOCK)[:, None]
        full = tl.arange(0, HEAD_BLOCK)[None, :]
        inside = (head < KV_HEADS) & (full < HEAD_DIM)
        value = tl.load(v + token * v_stride + head * v_head_stride + full, mask=inside, other=0.0)
        place = key + PAGE * KV_HEADS * HEAD_DIM + head * HEAD_DIM + full
        tl.store(place, value.to(kv.dtype.element_ty), mask=inside)


def rope_and_write_triton(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: ForwardBatch, kv: Tensor) -> Tensor:
    """Triton form of `rope_and_write`."""
    tokens, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos_sin.shape[-1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens:
        _rope_and_write[(tokens, 2)](
            q,
            k,
            v,
            cos_sin,
            batch.positions,
            batch.kv_slots,
            out,
            kv,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            HEADS=heads,
            HEADS_BLOCK=triton.next_power_of_2(heads),
            KV_HEADS=kv_heads,
            KV_HEADS_BLOCK=triton.next_power_of_2(kv_heads),
            HEAD_DIM=head_dim,
            HEAD_BLOCK=triton.next_power_of_2(head_dim),
            HALF=half,
            HALF_BLOCK=triton.next_power_of_2(half),
            REST_BLOCK=triton.next_power_of_2(max(1, head_dim - 2 * half)),
            PAGE=kv.shape[2],
            num_warps=4,
            **launch_options(),
        )
    return out
