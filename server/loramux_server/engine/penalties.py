"""What changes the logits of single tokens before one of them is picked: penalties, logit bias, banned tokens.

A step may be launched before the token that a row goes on from has reached the host (`RowPlan.source`). The history
lacks that *late* token then, and only that one. Nobody waits for it, the device makes up for it:

- penalties: the tokens of the history and their counts go to the device in every step. The late token is looked up
  among them there, and its own logit is computed once more, with one occurrence more.
- bad words: the host names those that a certain late token would bring to their last one; the device compares it.

The device keeps nothing of a sequence from step to step, so a step that failed, was dropped or runs again leaves
nothing to undo. A resident table of counts would need that, 4 V bytes a sequence, and a pass over the whole vocabulary
in each step, of which a text uses little.

R = sampled rows, V = vocabulary size, P = rows with penalties, N = different tokens that those have seen, all together.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.packed_rows import Array
from loramux_server.engine.plan import RowPlan

_ALIGNMENT = 16
_DTYPES = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32, "float64": torch.float64}


class Penalties:
    """Adjusts logits; stateless but for counts of seen tokens, kept on the host a sequence.

    Args:
        vocab_size: V.
        device: Where the logits are.
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seen: dict[int, _SeenTokens] = {}

    def release(self, sequence_id: int) -> None:
        """Forget a sequence."""
        self._seen.pop(sequence_id, None)

    def adjust(self, logits: Tensor, rows: Sequence[RowPlan], sampled: Tensor | None = None) -> Tensor:
        """Apply penalties, then logit bias, then bans; touches only the tokens that these name, and never waits.

        Args:
            logits: `[R, V]` float32, raw; not modified.
            rows: The plan's sampled rows, in the order of `logits`.
            sampled: `[R']` tokens that the step before has sampled, on the device; needed by rows with a `source`.

        Returns:
            `[R, V]` float32; `logits` itself when no row asks for anything.
        """
        edits = self._edits(rows)
        if edits.empty:
            return logits
        tokens, counts, sizes, bases, rates, sources, biased, bias, banned, late_banned, needed, late_sources = _send(
            edits.fields(), self._device
        )
        flat = logits.clone().view(-1)
        if edits.penalised:
            late = _late_tokens(sampled, sources)
            _penalise(flat, _Seen(tokens, counts, sizes, bases, rates, late))
        if edits.biased:
            flat.index_copy_(0, biased, flat.index_select(0, biased) + bias)
        if edits.banned:
            flat.index_fill_(0, banned, -math.inf)
        if edits.late_banned:
            completed = _late_tokens(sampled, late_sources) == needed
            limit = flat.new_full(completed.shape, math.inf).masked_fill_(completed, -math.inf)
            # A token stands here twice if it is the last one of two words: either bans it.
            flat.scatter_reduce_(0, late_banned, limit, "amin")
        return flat.view(logits.shape)

    def _edits(self, rows: Sequence[RowPlan]) -> "_Edits":
        edits = _Edits()
        for index, row in enumerate(rows):
            spec = row.sampling
            assert spec is not None, "a sampled row has its sampling"
            base = index * self._vocab_size
            if spec.repetition_penalty != 1.0 or spec.presence_penalty or spec.frequency_penalty:
                seen = self._seen.setdefault(row.sequence_id, _SeenTokens(row.prompt_length))
                seen.update(_history(row))
                edits.penalised.append((base, row.source, seen, spec))
            # Ids past the model's vocabulary can never be sampled: there is nothing to bias or ban.
            for token, value in spec.logit_bias.items():
                if 0 <= token < self._vocab_size:
                    edits.biased.append(base + token)
                    edits.bias.append(value)
            for token, needed in _bans(row, spec):
                if 0 <= token < self._vocab_size:
                    if needed is None:
                        edits.banned.append(base + token)
                    else:
                        edits.late_banned.append((base + token, needed, row.source))
        # Those with a late token first: what is computed for them is then the front of what is computed for all.
        edits.penalised.sort(key=lambda entry: entry[1] < 0)
        return edits


@dataclasses.dataclass(slots=True)
class _Edits:
    """What to change in a step's logits; places are flat, `row * V + token`.

    Attributes:
        penalised: Base `row * V`, source, seen tokens and sampling of each row with penalties.
        biased: Places that get a bias.
        bias: Theirs.
        banned: Places whose token must not come next.
        late_banned: Place, the late token that bans it, and the source of that.
    """

    penalised: "list[tuple[int, int, _SeenTokens, SamplingSpec]]" = dataclasses.field(default_factory=list)
    biased: list[int] = dataclasses.field(default_factory=list)
    bias: list[float] = dataclasses.field(default_factory=list)
    banned: list[int] = dataclasses.field(default_factory=list)
    late_banned: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to change."""
        return not (self.penalised or self.biased or self.banned or self.late_banned)

    def fields(self) -> list[Array]:
        """All of it in arrays: the first five as in `_Seen`, sources `[L]`, and the others in order."""
        seen = [seen.counts() for _, _, seen, _ in self.penalised]
        none = np.zeros(0, dtype=np.int32)
        return [
            np.concatenate([none, *(tokens for tokens, _ in seen)]),
            np.concatenate([none, *(counts for _, counts in seen)]),
            _integers([len(tokens) for tokens, _ in seen]),
            _integers([base for base, _, _, _ in self.penalised]),
            np.asarray(
                [
                    (spec.repetition_penalty, spec.frequency_penalty, spec.presence_penalty)
                    for _, _, _, spec in self.penalised
                ],
                dtype=np.float64,
            ).reshape(-1, 3),
            _integers([source for _, source, _, _ in self.penalised if source >= 0]),
            _integers(self.biased),
            np.asarray(self.bias, dtype=np.float32),
            _integers(self.banned),
            *_integers(self.late_banned).reshape(-1, 3).T,
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """What the rows with penalties have seen, on the device; the L rows with a late token come first.

    Attributes:
        tokens: `[N]` int32, each once a row, row after row.
        counts: `[N]` int32, their occurrences in the output.
        sizes: `[P]` int64, how many of them each row has.
        bases: `[P]` int64, `row * V`.
        rates: `[P, 3]` float64, repetition, frequency and presence penalty.
        late: `[L]` int64.
    """

    tokens: Tensor
    counts: Tensor
    sizes: Tensor
    bases: Tensor
    rates: Tensor
    late: Tensor


def _penalise(flat: Tensor, seen: _Seen) -> None:
    """Write the penalised logits over the raw ones `[R * V]`."""
    # With its size given, this does not ask the device for it.
    owner = torch.repeat_interleave(seen.sizes, output_size=len(seen.tokens))
    where = seen.bases.index_select(0, owner) + seen.tokens
    written = [(where, _penalised(flat, where, seen.rates.index_select(0, owner), seen.counts))]
    count = len(seen.late)
    if count:
        late = torch.cat((seen.late, seen.late.new_full((len(seen.sizes) - count,), -1)))
        same = late.index_select(0, owner) == seen.tokens
        before = torch.zeros_like(seen.sizes).index_add_(0, owner, (seen.counts * same).to(torch.int64))
        where = seen.bases[:count] + seen.late
        written.append((where, _penalised(flat, where, seen.rates[:count], before[:count] + 1)))
    # The late tokens last: they may be among those of the history.
    for where, values in written:
        flat.index_copy_(0, where, values)


def _penalised(flat: Tensor, where: Tensor, rates: Tensor, counts: Tensor) -> Tensor:
    values = flat.index_select(0, where)
    factor = rates[:, 0].to(torch.float32)
    values = torch.where(values > 0, values / factor, values * factor)
    return values - (rates[:, 1] * counts + rates[:, 2] * (counts > 0)).to(torch.float32)


def _late_tokens(sampled: Tensor | None, sources: Tensor) -> Tensor:
    """`[L]` int64: the tokens that the step before has sampled for these rows."""
    if not len(sources):
        return sources
    assert sampled is not None, "a token is taken from no step"
    return sampled.index_select(0, sources).to(torch.int64)


def _send(fields: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The fields on the device, by one copy."""
    begins = np.cumsum([0, *(-(-field.nbytes // _ALIGNMENT) * _ALIGNMENT for field in fields)]).tolist()
    buffer = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = buffer.numpy()
    spans = [(begin, begin + field.nbytes) for begin, field in zip(begins, fields, strict=False)]
    for field, (begin, end) in zip(fields, spans, strict=True):
        host[begin:end] = np.ascontiguousarray(field).reshape(-1).view(np.uint8)
    sent = buffer.to(device, non_blocking=True)
    return [
        sent[begin:end].view(_DTYPES[field.dtype.name]).view(field.shape)
        for field, (begin, end) in zip(fields, spans, strict=True)
    ]


def _integers(values: Sequence[object]) -> Array:
    return np.asarray(values, dtype=np.int64)


class _SeenTokens:
    """Token counts of one sequence, brought up to date from its history.

    Kept as arrays: a long prompt has thousands of distinct tokens, and every step of its sequence needs them all.
    """

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._start([])

    def _start(self, prompt: Sequence[int]) -> None:
        """Take in a prompt, or a part of it, all at once: it may be as long as the model allows."""
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        used = len(self._place)
        self._tokens = np.zeros(max(64, 2 * used), dtype=np.int32)
        self._tokens[:used] = list(self._place)
        self._counts = np.zeros_like(self._tokens)
        self._length = len(prompt)

    def update(self, history: Sequence[int]) -> None:
        """Count what is new in the history."""
        if not 0 < self._length <= len(history):  # Only a reused id could shrink: start over rather than be wrong.
            self._start(history[: self._prompt_length])
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
        """Tokens seen in prompt or output, each once, and their occurrences in the output; both `[n]` int32."""
        used = len(self._place)
        return self._tokens[:used], self._counts[:used]


def _history(row: RowPlan) -> Sequence[int]:
    late = row.position - len(row.history)
    assert late == (row.source >= 0), f"{late} tokens are late, source {row.source}"
    return row.history


def _bans(row: RowPlan, spec: SamplingSpec) -> Iterator[tuple[int, int | None]]:
    """Tokens that must not come next: end tokens before `min_tokens`, and those that would complete a bad word.

    With each comes the late token without which the ban does not hold; None = it holds.
    """
    if row.position - row.prompt_length < spec.min_tokens:
        yield from ((token, None) for token in spec.stop_token_ids)
        yield from ((token, None) for token in spec.eos_token_ids if not spec.ignore_eos)
    for word in filter(None, spec.bad_words):
        known, needed = word[:-1], None
        if known and row.source >= 0:
            known, needed = known[:-1], known[-1]
        if not known or _ends_with(_history(row), known):
            yield word[-1], needed


def _ends_with(history: Sequence[int], tokens: Sequence[int]) -> bool:
    return len(history) >= len(tokens) and list(history[len(history) - len(tokens) :]) == list(tokens)
