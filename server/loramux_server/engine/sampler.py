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
from loramux_server.kernels.sampling import GOLDEN, MIX1, MIX2, pick, signed64

_MASK64 = (1 << 64) - 1
# Below it logits would overflow float32 when divided; neighbouring float32 logits are already far apart at it.
_LOWEST_TEMPERATURE = 1e-6


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
        self._greedy = torch.zeros(0, dtype=torch.int64, device=device)

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
        wanted = [spec.logprobs for spec in specs if spec.logprobs is not None]
        parameters, keys = self._parameters(rows, specs)
        adjusted = self._adjust(logits, rows, specs)
        picked = pick(logits, adjusted, parameters, keys, normaliser=bool(wanted))
        if not wanted:
            return Sampled(packed=picked, top=0)
        top = max(wanted)
        normaliser = picked[:, 2:].view(torch.float32)
        columns = _logprob_columns(logits, picked[:, 0].to(torch.int64), normaliser, top)
        return Sampled(packed=torch.cat([picked[:, :2], *columns], dim=1), top=top)

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, top: int) -> Tensor:
        """Log-probabilities of known next tokens.

        Args:
            logits: `[N, V]` float32 raw logits of the prompt's rows.
            targets: `[N]` int64, the tokens that follow them.
            top: How many best tokens to report.

        Returns:
            `[N, 1 + 2 * top]` int32, the last columns of `Sampled.packed`.
        """
        return torch.cat(_logprob_columns(logits, targets, logits.logsumexp(dim=-1, keepdim=True), top), dim=1)

    def _parameters(self, rows: Sequence[RowPlan], specs: Sequence[SamplingSpec]) -> tuple[Tensor, Tensor]:
        """Parameters `[R, 4]` float64 and random keys `[R]` int64 of the rows, as `pick` takes them, in one copy."""
        count = len(rows)
        if all(spec.temperature == 0 for spec in specs):
            if len(self._greedy) < 5 * count:
                self._greedy = torch.zeros(10 * count, dtype=torch.int64, device=self._device)
            both = self._greedy[: 5 * count]
        else:
            packed = np.zeros(5 * count, dtype=np.int64)
            packed[: 4 * count].view(np.float64).reshape(count, 4)[:] = [
                _parameters(spec, self._vocab_size) for spec in specs
            ]
            packed[4 * count :] = [
                signed64(_row_key(spec.seed, row.choice, row.position)) for row, spec in zip(rows, specs, strict=True)
            ]
            both = self._send(torch.from_numpy(packed))
        return both[: 4 * count].view(torch.float64).view(count, 4), both[4 * count :]

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


def _parameters(spec: SamplingSpec, vocab_size: int) -> tuple[float, float, float, float]:
    if spec.temperature == 0:
        return 0.0, 0.0, 1.0, 0.0
    top_k = spec.top_k if spec.top_k < vocab_size else 0
    return max(spec.temperature, _LOWEST_TEMPERATURE), float(top_k), spec.top_p, spec.min_p


def _row_key(seed: int, choice: int, position: int) -> int:
    key = seed & _MASK64
    for value in (choice, position):
        key = _splitmix((key + GOLDEN * (value + 1)) & _MASK64)
    return key


def _splitmix(value: int) -> int:
    value = ((value ^ (value >> 30)) * MIX1) & _MASK64
    value = ((value ^ (value >> 27)) * MIX2) & _MASK64
    return value ^ (value >> 31)


def _logprob_columns(logits: Tensor, token_ids: Tensor, normaliser: Tensor, top: int) -> list[Tensor]:
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
