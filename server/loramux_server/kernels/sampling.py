"""Picks a token of each row of logits: greedy and sampled rows together, no sort of the vocabulary.

`pick(raw [R, V], adjusted [R, V], parameters [R, 4], keys [R], normaliser=...)` returns `[R, 2 or 3]` int32: token id,
1 if every raw logit is finite, and on demand the bits of the float32 log-sum-exp of the raw logits.

Of a row with temperature 0, the token of the largest adjusted logit; of equal ones the first. Else `scaled = adjusted /
temperature`, and of the tokens that pass all limits the one that wins an exponential race, `argmax(scaled - log E)`
with `E` an exponential variate hashed from (key, token id):

- top-k: among the k largest, and equals of the k-th;
- top-p: at or above the largest limit that keeps at least this share of the mass of what top-k kept;
- min-p: probability at least this share of the largest one.

There is no generator state and no other row in it: a row's token does not depend on the batch. What is banned is -inf.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux_server.kernels.capability import use_triton


def signed64(value: int) -> int:
    """The two's complement reading of 64 bits."""
    return value - (1 << 64) if value >> 63 else value


GOLDEN = signed64(0x9E3779B97F4A7C15)
MIX1 = signed64(0xBF58476D1CE4E5B9)
MIX2 = signed64(0x94D049BB133111EB)

# Largest top-k that is taken from the sorted best.
_SORTED_TOP_K = 1024
# Bisection steps for top-p and a large top-k: the logit range over 2^32 is far below float32 resolution of any logit
# that matters.
_BISECTIONS = 32


def pick(raw: Tensor, adjusted: Tensor, parameters: Tensor, keys: Tensor, *, normaliser: bool) -> Tensor:
    """Pick a token a row.

    Args:
        raw: `[R, V]` float32, logits as the model gave them.
        adjusted: `[R, V]` float32, with penalties, bias and bans; the same tensor where there are none.
        parameters: `[R, 4]` float64: temperature (0 = greedy), top-k (0 = off), top-p (1 = off), min-p (0 = off).
        keys: `[R]` int64, the rows' random keys.
        normaliser: Whether the third column is wanted.

    Returns:
        `[R, 2]` or `[R, 3]` int32.
    """
    if use_triton(raw, "sampling", _unsupported(raw, adjusted)):
        from loramux_server.kernels.sampling_triton import pick_triton

        return pick_triton(raw, adjusted, parameters, keys, normaliser=normaliser)
    return pick_torch(raw, adjusted, parameters, keys, normaliser=normaliser)


def pick_torch(raw: Tensor, adjusted: Tensor, parameters: Tensor, keys: Tensor, *, normaliser: bool) -> Tensor:
    """Torch form of `pick`."""
    finite = raw.amax(dim=-1).isfinite() & raw.amin(dim=-1).isfinite()
    tokens = adjusted.argmax(dim=-1)
    sampled = torch.nonzero(parameters[:, 0] > 0).squeeze(1)
    if len(sampled) > 0:
        everything = len(sampled) == len(parameters)
        picked = _draw(
            adjusted if everything else adjusted.index_select(0, sampled), parameters[sampled], keys[sampled]
        )
        tokens = picked if everything else tokens.index_copy(0, sampled, picked)
    columns = [tokens.to(torch.int32)[:, None], finite.to(torch.int32)[:, None]]
    if normaliser:
        columns.append(raw.logsumexp(dim=-1, keepdim=True).view(torch.int32))
    return torch.cat(columns, dim=1)


def _unsupported(raw: Tensor, adjusted: Tensor) -> str | None:
    """Name what the Triton form cannot take, None if nothing."""
    if raw.dtype != torch.float32 or adjusted.dtype != torch.float32:
        return f"logits of dtype {raw.dtype}"
    if raw.stride(-1) != 1 or adjusted.stride(-1) != 1:
        return "logits are not contiguous"
    return None


def _draw(logits: Tensor, parameters: Tensor, keys: Tensor) -> Tensor:
    """Sample `[R, V]` adjusted logits, every temperature above 0; returns `[R]` int64."""
    kept = [int(value) for value in parameters[:, 1].tolist()]
    scaled = logits / parameters[:, :1].to(torch.float32)
    largest = scaled.amax(dim=-1, keepdim=True)
    limit = torch.full_like(largest, -math.inf)
    if any(kept):
        limit = _top_k_limit(scaled, largest, limit, parameters[:, 1:2].to(torch.int64), kept)
    if bool((parameters[:, 2] < 1).any()):
        limit = torch.maximum(limit, _top_p_limit(scaled, largest, limit, parameters[:, 2:3]))
    if bool((parameters[:, 3] > 0).any()):
        limit = torch.maximum(limit, largest + parameters[:, 3:4].log().to(torch.float32))
    score = scaled - _exponential(keys, logits.shape[-1]).log_()
    return score.masked_fill_(scaled < limit, -math.inf).argmax(dim=-1)


def _top_k_limit(scaled: Tensor, largest: Tensor, floor: Tensor, top_k: Tensor, host_top_k: Sequence[int]) -> Tensor:
    """The k-th largest logit of each row, or `floor` where top-k is off (0); `[R, 1]` float32.

    A row's method depends on its own k alone. A small k is taken from the sorted best; a large one is searched by
    bisection, or one request could make everybody's step sort the vocabulary.

    Args:
        scaled: `[R, V]`.
        largest: `[R, 1]`, its row maxima.
        floor: `[R, 1]`.
        top_k: `[R, 1]` int64, below V.
        host_top_k: The same on the host.
    """
    limit = floor
    count = max((k for k in host_top_k if k <= _SORTED_TOP_K), default=0)
    if count:
        best = scaled.topk(count, dim=-1).values
        kth = best.gather(1, (top_k - 1).clamp(0, count - 1))
        limit = torch.where((top_k > 0) & (top_k <= _SORTED_TOP_K), kth, limit)
    if max(host_top_k) > _SORTED_TOP_K:
        low = scaled.masked_fill(scaled == -math.inf, math.inf).amin(dim=-1, keepdim=True).minimum(largest)
        enough_at_low = (scaled >= low).sum(dim=-1, keepdim=True) >= top_k
        high = largest.clone()
        for _ in range(_BISECTIONS):
            middle = low + (high - low) / 2
            enough = (scaled >= middle).sum(dim=-1, keepdim=True) >= top_k
            low = torch.where(enough, middle, low)
            high = torch.where(enough, high, middle)
        # Fewer unbanned tokens than k: all of them stay.
        limit = torch.where(top_k > _SORTED_TOP_K, torch.where(enough_at_low, low, floor), limit)
    return limit


def _top_p_limit(scaled: Tensor, largest: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
    """Largest logit limit whose kept mass is still >= top_p of the mass above `floor`; `[R, 1]` float32.

    Bisection instead of a sort. Sums are float64, so that a row's limit does not move with the number of rows.
    """
    weights = (scaled - largest).to(torch.float64).exp_()
    weights.masked_fill_(scaled < floor, 0.0)
    needed = top_p * weights.sum(dim=-1, keepdim=True)
    # Kept mass at `low` is always enough; tokens under exp(-80) of the best carry no mass in float64 sums.
    low = torch.maximum(floor, largest - 80.0)
    high = largest.clone()
    enough_at_high = weights.masked_fill(scaled < high, 0.0).sum(dim=-1, keepdim=True) >= needed
    for _ in range(_BISECTIONS):
        middle = low + (high - low) / 2
        enough = weights.masked_fill(scaled < middle, 0.0).sum(dim=-1, keepdim=True) >= needed
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle)
    limit = torch.where(enough_at_high, largest, low)
    return torch.where(top_p < 1, limit, floor)  # A row without top-p loses nothing to its neighbours'.


def _exponential(keys: Tensor, vocab_size: int) -> Tensor:
    """Exponential variates `[R, V]` float32 hashed from `[R]` int64 keys and the token id."""
    token = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=keys.device)
    bits = keys[:, None] + token[None, :] * GOLDEN
    # torch shifts int64 arithmetically: mask the copies of the sign bit away.
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * MIX1
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * MIX2
    bits = bits ^ ((bits >> 31) & ((1 << 33) - 1))
    uniform = (bits >> 24) & ((1 << 40) - 1)
    # Small variates decide the race: float32 of a 40-bit integer keeps their relative precision, log1p does the same.
    value = (uniform.to(torch.float32) + 0.5) * (1.0 / (1 << 40))
    return value.clamp_(max=1.0 - 2.0**-24).neg_().log1p_().neg_()
