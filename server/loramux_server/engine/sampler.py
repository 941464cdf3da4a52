"""Picks the next token of each sampled row: greedy and sampled rows together, no sort of the whole vocabulary.

Order of operations on a row's raw logits: finite check, log-probabilities (of the raw logits), repetition, presence and
frequency penalties, logit bias, banned tokens (end tokens before `min_tokens`, last tokens of bad words), temperature,
top-k, top-p over what top-k kept, min-p, draw.

The draw is an exponential race: `argmax(logit / T - log E)` with `E` an exponential variate hashed from (seed, choice,
position, token id) by splitmix64. It uses no generator state, so a row's token does not depend on the other rows, on
the row's place in the batch, or on whether it was preempted and computed again.

R = sampled rows, V = vocabulary size.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loramux_server.engine.messages import SamplingSpec, TokenLogprob
from loramux_server.engine.packed_rows import Array
from loramux_server.engine.plan import RowPlan

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
# Below it logits would overflow float32 when divided; neighbouring float32 logits are already far apart at it.
_LOWEST_TEMPERATURE = 1e-6
# Largest top-k that is taken from the sorted best.
_SORTED_TOP_K = 1024
# Bisection steps for top-p and a large top-k: the logit range over 2^32 is far below float32 resolution of any logit
# that matters.
_BISECTIONS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """Device results of one step, still to be copied: one int32 tensor `[R, 2 + 1 + 2k]`.

    Columns: token id, finite flag, bits of the chosen token's float32 log-probability, k token ids, bits of their k
    log-probabilities. Without log-probabilities only the first two columns exist.
    """

    packed: Tensor
    top: int


class Sampler:
    """Stateless but for counts of seen tokens, kept a sequence for penalties.

    Args:
        vocab_size: V.
        device: Where the logits are.
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seen: dict[int, _SeenTokens] = {}

    def release(self, sequence_id: int) -> None:
        """Forget a finished sequence."""
        self._seen.pop(sequence_id, None)

    def sample(self, logits: Tensor, rows: Sequence[RowPlan]) -> Sampled:
        """Sample one token a row.

        Args:
            logits: `[R, V]` float32, raw; not modified.
            rows: The plan's sampled rows, in the order of `logits`.
        """
        specs = [_spec(row) for row in rows]
        finite = logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite()
        adjusted = self._adjust(logits, rows, specs)
        token_ids = adjusted.argmax(dim=-1)
        sampled = [index for index, spec in enumerate(specs) if spec.temperature > 0]
        if sampled:
            everything = len(sampled) == len(rows)
            chosen = self._index(sampled)
            picked = _draw(
                adjusted if everything else adjusted.index_select(0, chosen),
                [specs[index] for index in sampled],
                [rows[index] for index in sampled],
            )
            token_ids = picked if everything else token_ids.index_copy(0, chosen, picked)
        columns = [token_ids.to(torch.int32)[:, None], finite.to(torch.int32)[:, None]]
        wanted = [spec.logprobs for spec in specs if spec.logprobs is not None]
        top = max(wanted, default=0)
        if wanted:
            columns.extend(_logprob_columns(logits, token_ids, top))
        return Sampled(packed=torch.cat(columns, dim=1), top=top)

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, top: int) -> Tensor:
        """Log-probabilities of known next tokens.

        Args:
            logits: `[N, V]` float32 raw logits of the prompt's rows.
            targets: `[N]` int64, the tokens that follow them.
            top: How many best tokens to report.

        Returns:
            `[N, 1 + 2 * top]` int32, the last columns of `Sampled.packed`.
        """
        return torch.cat(_logprob_columns(logits, targets, top), dim=1)

    def _index(self, values: Sequence[int] | Array) -> Tensor:
        return self._send(torch.as_tensor(np.asarray(values, dtype=np.int64)))

    def _floats(self, values: Sequence[float] | Array) -> Tensor:
        return self._send(torch.as_tensor(np.asarray(values, dtype=np.float32)))

    def _send(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _adjust(self, logits: Tensor, rows: Sequence[RowPlan], specs: Sequence[SamplingSpec]) -> Tensor:
        """Apply everything that names single tokens; touches only those, through flat indices `row * V + token`."""
        flat: Tensor | None = None

        def target() -> Tensor:
            nonlocal flat
            if flat is None:
                flat = logits.clone().view(-1)
            return flat

        penalties = _Penalties()
        biased: list[int] = []
        bias: list[float] = []
        banned: list[int] = []
        for index, (row, spec) in enumerate(zip(rows, specs, strict=True)):
            base = index * self._vocab_size
            if spec.repetition_penalty != 1.0 or spec.presence_penalty or spec.frequency_penalty:
                seen = self._seen.setdefault(row.sequence_id, _SeenTokens(row.prompt_length))
                seen.update(row.history)
                penalties.add(base, *seen.counts(), spec)
            # Ids past the model's vocabulary can never be sampled: there is nothing to bias or ban.
            for token, value in spec.logit_bias.items():
                if 0 <= token < self._vocab_size:
                    biased.append(base + token)
                    bias.append(value)
            banned.extend(base + token for token in _banned(row, spec) if 0 <= token < self._vocab_size)
        if penalties.where:
            where = self._index(np.concatenate(penalties.where))
            values = target().index_select(0, where)
            factor = self._floats(np.concatenate(penalties.factor))
            values = torch.where(values > 0, values / factor, values * factor)
            target().index_copy_(0, where, values - self._floats(np.concatenate(penalties.subtract)))
        if biased:
            where = self._index(biased)
            target().index_copy_(0, where, target().index_select(0, where) + self._floats(bias))
        if banned:
            target().index_fill_(0, self._index(banned), -math.inf)
        return logits if flat is None else flat.view(logits.shape)


@dataclasses.dataclass(slots=True)
class _Penalties:
    """Penalised tokens of all rows, an array a row: flat index, repetition factor, what is subtracted."""

    where: list[Array] = dataclasses.field(default_factory=list)
    factor: list[Array] = dataclasses.field(default_factory=list)
    subtract: list[Array] = dataclasses.field(default_factory=list)

    def add(self, base: int, tokens: Array, counts: Array, spec: SamplingSpec) -> None:
        """Add a row whose logits begin at flat index `base`."""
        self.where.append(tokens + base)
        self.factor.append(np.full(len(tokens), spec.repetition_penalty))
        self.subtract.append(spec.frequency_penalty * counts + spec.presence_penalty * (counts > 0))


class _SeenTokens:
    """Token counts of one sequence, brought up to date from its history.

    Kept as arrays: a long prompt has thousands of distinct tokens, and every step of its sequence needs them all.
    """

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._clear()

    def _clear(self) -> None:
        self._place: dict[int, int] = {}
        self._tokens = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.int64)
        self._length = 0

    def update(self, history: Sequence[int]) -> None:
        """Count what is new in the history."""
        if len(history) < self._length:  # Only a reused id could shrink: start over rather than be wrong.
            self._clear()
        for position in range(self._length, len(history)):
            token = history[position]
            place = self._place.get(token)
            if place is None:
                place = self._place[token] = len(self._place)
                if place == len(self._tokens):
                    self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
                    self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
                self._tokens[place] = token
            self._counts[place] += position >= self._prompt_length
        self._length = len(history)

    def counts(self) -> tuple[Array, Array]:
        """Tokens seen in prompt or output, each once, and their occurrences in the output; both `[n]` int64."""
        used = len(self._place)
        return self._tokens[:used], self._counts[:used]


def _spec(row: RowPlan) -> SamplingSpec:
    assert row.sampling is not None, "a sampled row has its sampling"
    return row.sampling


def _banned(row: RowPlan, spec: SamplingSpec) -> set[int]:
    """Tokens that must not come next: end tokens before `min_tokens`, and those that would complete a bad word."""
    banned: set[int] = set()
    if row.position - row.prompt_length < spec.min_tokens:
        banned.update(spec.stop_token_ids)
        banned.update(spec.eos_token_ids if not spec.ignore_eos else ())
    for word in filter(None, spec.bad_words):
        prefix = word[:-1]
        if not prefix or (
            len(row.history) >= len(prefix) and list(row.history[len(row.history) - len(prefix) :]) == list(prefix)
        ):
            banned.add(word[-1])
    return banned


def _draw(logits: Tensor, specs: Sequence[SamplingSpec], rows: Sequence[RowPlan]) -> Tensor:
    """Sample `[R, V]` adjusted logits; every spec has temperature > 0. Returns `[R]` int64."""
    cuda = logits.is_cuda
    # One small copy for all parameters: temperature, top_k, top_p, min_p as float64 (top_k is exact below 2^53).
    vocab_size = logits.shape[-1]
    kept = [spec.top_k if spec.top_k < vocab_size else 0 for spec in specs]
    parameters = torch.tensor(
        [
            [max(spec.temperature, _LOWEST_TEMPERATURE), float(top_k), spec.top_p, spec.min_p]
            for spec, top_k in zip(specs, kept, strict=True)
        ],
        dtype=torch.float64,
        pin_memory=cuda,
    ).to(logits.device, non_blocking=True)
    scaled = logits / parameters[:, :1].to(torch.float32)
    largest = scaled.amax(dim=-1, keepdim=True)
    limit = torch.full_like(largest, -math.inf)
    if any(kept):
        limit = _top_k_limit(scaled, largest, limit, parameters[:, 1:2].to(torch.int64), kept)
    if any(spec.top_p < 1 for spec in specs):
        limit = torch.maximum(limit, _top_p_limit(scaled, largest, limit, parameters[:, 2:3]))
    if any(spec.min_p > 0 for spec in specs):
        limit = torch.maximum(limit, largest + parameters[:, 3:4].log().to(torch.float32))
    keys = torch.tensor(
        [_signed(_row_key(_spec(row).seed, row.choice, row.position)) for row in rows],
        dtype=torch.int64,
        pin_memory=cuda,
    ).to(logits.device, non_blocking=True)
    score = scaled - _exponential(keys, vocab_size).log_()
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


def _row_key(seed: int, choice: int, position: int) -> int:
    key = seed & _MASK64
    for value in (choice, position):
        key = _splitmix((key + _GOLDEN * (value + 1)) & _MASK64)
    return key


def _splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _exponential(keys: Tensor, vocab_size: int) -> Tensor:
    """Exponential variates `[R, V]` float32 hashed from `[R]` int64 keys and the token id."""
    token = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=keys.device)
    bits = keys[:, None] + token[None, :] * _signed(_GOLDEN)
    # torch shifts int64 arithmetically: mask the copies of the sign bit away.
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * _signed(_MIX1)
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * _signed(_MIX2)
    bits = bits ^ ((bits >> 31) & ((1 << 33) - 1))
    uniform = (bits >> 24) & ((1 << 40) - 1)
    # Small variates decide the race: float32 of a 40-bit integer keeps their relative precision, log1p does the same.
    value = (uniform.to(torch.float32) + 0.5) * (1.0 / (1 << 40))
    return value.clamp_(max=1.0 - 2.0**-24).neg_().log1p_().neg_()


def _logprob_columns(logits: Tensor, token_ids: Tensor, top: int) -> list[Tensor]:
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids[:, None]) - normaliser
    columns = [chosen.view(torch.int32)]
    if top:
        best = logits.topk(top, dim=-1)
        columns.append(best.indices.to(torch.int32))
        columns.append((best.values - normaliser).contiguous().view(torch.int32))
    return columns


def unpack_logprobs(columns: Tensor, top: int, asked: Sequence[int | None]) -> list[TokenLogprob | None]:
    """Read the log-probability columns back on the host.

    Args:
        columns: `[N, 1 + 2 * top]` int32 on CPU.
        top: Best tokens a row in `columns`.
        asked: How many of them each row wants; None = no log-probabilities for it.
    """
    chosen = columns[:, 0].contiguous().view(torch.float32).tolist()
    ids = columns[:, 1 : 1 + top].tolist()
    values = columns[:, 1 + top : 1 + 2 * top].contiguous().view(torch.float32).tolist() if top else [[]] * len(chosen)
    return [
        None
        if count is None
        else TokenLogprob(logprob=chosen[row], top=list(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, count in enumerate(asked)
    ]
