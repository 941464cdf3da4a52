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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loramux_server.engine.messages import SamplingSpec, TokenLogprob
from loramux_server.engine.penalties import Penalties
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
    """Stateless but for what `Penalties` keeps.

    Args:
        vocab_size: V.
        device: Where the logits are.
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._penalties = Penalties(vocab_size=vocab_size, device=device)
        self._greedy = torch.zeros(0, dtype=torch.int64, device=device)

    def release(self, sequence_id: int) -> None:
        """Forget a finished sequence."""
        self._penalties.release(sequence_id)

    def sample(self, logits: Tensor, rows: Sequence[RowPlan], sampled: Tensor | None = None) -> Sampled:
        """Sample one token a row.

        Args:
            logits: `[R, V]` float32, raw; not modified.
            rows: The plan's sampled rows, in the order of `logits`.
            sampled: `[R']` tokens that the step before has sampled, on the device; needed by rows with a `source`.
        """
        specs = [_spec(row) for row in rows]
        wanted = [spec.logprobs for spec in specs if spec.logprobs is not None]
        parameters, keys = self._parameters(rows, specs)
        adjusted = self._penalties.adjust(logits, rows, sampled)
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

    def _send(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


def _spec(row: RowPlan) -> SamplingSpec:
    assert row.sampling is not None, "a sampled row has its sampling"
    return row.sampling


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
