# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `sampling`: one program a row, which reads its logits some forty times from the L2 cache.

The limits of top-k and top-p are found bit by bit among the float32 values, two bits a pass: an exact k-th largest
logit and an exact smallest kept one, without a sort and without memory of the vocabulary's size. Tokens below them need
no random number, so whole blocks are skipped in the draw. A row's bits depend on nothing but its own logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.sampling import GOLDEN, MIX1, MIX2

_BLOCK = 4096
_WARPS = 16
_UNROLL = tl.constexpr(4)  # several loads in flight: a pass waits for the L2 cache, not for arithmetic

_GOLDEN = tl.constexpr(GOLDEN)
_MIX1 = tl.constexpr(MIX1)
_MIX2 = tl.constexpr(MIX2)
# Triton shifts int64 arithmetically: these mask the copies of the sign bit away.
_MASK34 = tl.constexpr((1 << 34) - 1)
_MASK37 = tl.constexpr((1 << 37) - 1)
_MASK33 = tl.constexpr((1 << 33) - 1)
_MASK40 = tl.constexpr((1 << 40) - 1)
_AFTER_MINUS_INF = tl.constexpr(1 << 23)


@triton.jit
def _value_of(rank):
    """The float32 that has this place, `[0, 2^32)`, in the order of all float32 (-NaN first, +NaN last)."""
    bits = (rank - 2147483648).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _enough(kept, needed, rank):
    """Whether a limit keeps enough; of the NaN, which nothing reaches, those past +inf do not, those before -inf do."""
    return ((kept >= needed) | (rank < _AFTER_MINUS_INF)).to(tl.int64)


@triton.jit
def _kth_largest(row, vocab, k, BLOCK: tl.constexpr):
    """A limit that exactly the k largest of a row reach, and equals of the k-th; -inf where fewer are above it."""
    rank = tl.cast(0, tl.int64)
    shift = 30
    while shift >= 0:
        step = tl.cast(1, tl.int64) << shift
        limit1, limit2, limit3 = _value_of(rank + step), _value_of(rank + 2 * step), _value_of(rank + 3 * step)
        kept1 = tl.zeros((BLOCK,), dtype=tl.int32)
        kept2 = tl.zeros((BLOCK,), dtype=tl.int32)
        kept3 = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=_UNROLL):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
            kept1 += (x >= limit1).to(tl.int32)
            kept2 += (x >= limit2).to(tl.int32)
            kept3 += (x >= limit3).to(tl.int32)
        count1, count2, count3 = tl.sum(kept1, 0), tl.sum(kept2, 0), tl.sum(kept3, 0)
        found = (count1 == k) | (count2 == k) | (count3 == k)
        moved = (
            _enough(count1, k, rank + step) + _enough(count2, k, rank + 2 * step) + _enough(count3, k, rank + 3 * step)
        )
        rank += moved * step
        # Of the limits that keep enough, the highest was taken: if one keeps exactly k, that is it.
        shift = tl.where(found, -1, shift - 2)
    value = _value_of(rank)
    return tl.where(value == value, value, -float("inf"))


@triton.jit
def _nucleus(row, vocab, largest, scale, floor, top_p, BLOCK: tl.constexpr):
    """The largest limit that keeps `top_p` of the mass at or above `floor`."""
    masses = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=_UNROLL):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
        masses += tl.where(x >= floor, tl.exp((x - largest) * scale), 0.0)
    needed = top_p * tl.sum(masses, 0)
    rank = tl.cast(0, tl.int64)
    shift = 30
    while shift >= 0:
        step = tl.cast(1, tl.int64) << shift
        limit1, limit2, limit3 = _value_of(rank + step), _value_of(rank + 2 * step), _value_of(rank + 3 * step)
        kept1 = tl.zeros((BLOCK,), dtype=tl.float32)
        kept2 = tl.zeros((BLOCK,), dtype=tl.float32)
        kept3 = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=_UNROLL):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
            mass = tl.where(x >= floor, tl.exp((x - largest) * scale), 0.0)
            kept1 += tl.where(x >= limit1, mass, 0.0)
            kept2 += tl.where(x >= limit2, mass, 0.0)
            kept3 += tl.where(x >= limit3, mass, 0.0)
        mass1, mass2, mass3 = tl.sum(kept1, 0), tl.sum(kept2, 0), tl.sum(kept3, 0)
        moved = (
            _enough(mass1, needed, rank + step)
            + _enough(mass2, needed, rank + 2 * step)
            + _enough(mass3, needed, rank + 3 * step)
        )
        rank += moved * step
        shift -= 2
    value = _value_of(rank)
    return tl.where(value == value, tl.maximum(tl.minimum(value, largest), floor), floor)


@triton.jit
def _exponential(key, token):
    """Exponential variates hashed from a row's key and token ids."""
    bits = key + (token.to(tl.int64) + 1) * _GOLDEN
    bits = (bits ^ ((bits >> 30) & _MASK34)) * _MIX1
    bits = (bits ^ ((bits >> 27) & _MASK37)) * _MIX2
    bits = bits ^ ((bits >> 31) & _MASK33)
    uniform = (((bits >> 24) & _MASK40).to(tl.float32) + 0.5) * (1.0 / 1099511627776.0)
    uniform = tl.minimum(uniform, 1.0 - 1.0 / 16777216.0)
    # log1p by Kahan's correction: small variates decide the race and keep their relative precision.
    rest = 1.0 - uniform
    return tl.where(rest == 1.0, uniform, -tl.log(rest) * uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest))


@triton.jit(do_not_specialize=["vocab"])
def _pick(
    raw,
    adjusted,
    parameters,
    keys,
    result,
    vocab,
    raw_stride,
    adjusted_stride,
    SAME: tl.constexpr,
    NORMALISER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    raw_row = raw + index * raw_stride
    row = adjusted + index * adjusted_stride
    highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    broken = tl.zeros((BLOCK,), dtype=tl.int32)
    best = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    where = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=_UNROLL):
        token = start + tl.arange(0, BLOCK)
        inside = token < vocab
        x = tl.load(raw_row + token, mask=inside, other=-float("inf"))
        broken |= ((x != x) | (inside & (tl.abs(x) == float("inf")))).to(tl.int32)
        if NORMALISER:
            higher = tl.maximum(highest, x)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(highest - base) + tl.exp(x - base)
            highest = higher
        if not SAME:
            x = tl.load(row + token, mask=inside, other=-float("inf"))
        better = x > best
        where = tl.where(better, token, where)
        best = tl.where(better, x, best)
    largest = tl.max(best, 0)
    chosen = tl.min(tl.where(best == largest, where, vocab), 0)
    chosen = tl.where(chosen < vocab, chosen, 0)

    temperature = tl.load(parameters + index * 4).to(tl.float32)
    if temperature > 0:
        top_k = tl.load(parameters + index * 4 + 1).to(tl.int32)
        top_p = tl.load(parameters + index * 4 + 2).to(tl.float32)
        min_p = tl.load(parameters + index * 4 + 3).to(tl.float32)
        limit = -float("inf")
        if top_k > 0:
            limit = _kth_largest(row, vocab, top_k, BLOCK)
        if top_p < 1:
            limit = _nucleus(row, vocab, largest, 1.0 / temperature, limit, top_p, BLOCK)
        scaled_limit = -float("inf")
        if min_p > 0:
            scaled_limit = tl.div_rn(largest, temperature) + tl.log(min_p)
        key = tl.load(keys + index)
        best = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        where = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in tl.range(0, vocab, BLOCK, loop_unroll_factor=_UNROLL):
            token = start + tl.arange(0, BLOCK)
            x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
            scaled = tl.div_rn(x, temperature)
            kept = (x >= limit) & (scaled >= scaled_limit) & (x > -float("inf"))
            if tl.max(kept.to(tl.int32), 0) > 0:
                score = tl.where(kept, scaled - tl.log(_exponential(key, token)), -float("inf"))
                better = score > best
                where = tl.where(better, token, where)
                best = tl.where(better, score, best)
        top = tl.max(best, 0)
        drawn = tl.min(tl.where(best == top, where, vocab), 0)
        # No token can be drawn where every score is -inf or NaN: the greedy one stands.
        chosen = tl.where((top > -float("inf")) & (drawn < vocab), drawn, chosen)

    width: tl.constexpr = 3 if NORMALISER else 2
    tl.store(result + index * width, chosen)
    tl.store(result + index * width + 1, (tl.max(broken, 0) == 0).to(tl.int32))
    if NORMALISER:
        peak = tl.max(highest, 0)
        mass = tl.sum(tl.where(highest == -float("inf"), 0.0, total * tl.exp(highest - peak)), 0)
        tl.store(result + index * width + 2, (peak + tl.log(mass)).to(tl.int32, bitcast=True))


def pick_triton(raw: Tensor, adjusted: Tensor, parameters: Tensor, keys: Tensor, *, normaliser: bool) -> Tensor:
    """Triton form of `pick`."""
    rows, vocab = raw.shape
    result = torch.empty((rows, 3 if normaliser else 2), dtype=torch.int32, device=raw.device)
    if rows == 0:
        return result
    block = min(_BLOCK, max(16, triton.next_power_of_2(vocab)))
    _pick[(rows,)](
        raw,
        adjusted,
        parameters,
        keys,
        result,
        vocab,
        raw.stride(0),
        adjusted.stride(0),
        SAME=raw.data_ptr() == adjusted.data_ptr(),
        NORMALISER=normaliser,
        BLOCK=block,
        num_warps=_WARPS if block == _BLOCK else 4,
    )
    return result
