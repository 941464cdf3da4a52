"""Rows with penalties and bans, what these do to logits token by token, and a fake device that samples under them."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.plan import RowPlan, StepHandle, StepPlan, StepResult
from loramux_server.engine.sampler import Sampler
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, FakeSlab

CPU = torch.device("cpu")


def make_spec(**fields: object) -> SamplingSpec:
    """Greedy sampling with these fields."""
    return SamplingSpec(**{"max_tokens": 16, "temperature": 0.0, **fields})  # type: ignore[arg-type]


def make_row(
    spec: SamplingSpec,
    *,
    position: int | None = None,
    choice: int = 0,
    history: Sequence[int] = (1, 2, 3),
    prompt: int = 3,
    source: int = -1,
    sequence_id: int = 0,
) -> RowPlan:
    """A sampled row; with a `source`, the token behind `history` is late."""
    return RowPlan(
        sequence_id=sequence_id,
        token_ids=[0],
        start=0,
        pages=[1],
        slot=-1,
        sample=True,
        sampling=spec,
        choice=choice,
        position=len(history) + (source >= 0) if position is None else position,
        history=history,
        prompt_length=prompt,
        source=source,
    )


def adjusted_one_by_one(logits: Tensor, history: Sequence[int], prompt: int, spec: SamplingSpec) -> Tensor:
    """`[V]` raw logits as the definitions change them, all of the history known; float32 as the sampler works."""
    values = logits.numpy().astype(np.float32)
    output = list(history[prompt:])
    if spec.repetition_penalty != 1.0 or spec.presence_penalty or spec.frequency_penalty:
        rate = np.float32(spec.repetition_penalty)
        for token in set(history):
            count = output.count(token)
            value = values[token] / rate if values[token] > 0 else values[token] * rate
            values[token] = value - np.float32(spec.frequency_penalty * count + spec.presence_penalty * (count > 0))
    for token, bias in spec.logit_bias.items():
        values[token] += np.float32(bias)
    banned = [word[-1] for word in spec.bad_words if list(history)[len(history) - len(word) + 1 :] == word[:-1]]
    if len(output) < spec.min_tokens:
        banned += spec.stop_token_ids + ([] if spec.ignore_eos else spec.eos_token_ids)
    values[banned] = -math.inf
    return torch.from_numpy(values)


def fake_logits(history: Sequence[int], path: str) -> Tensor:
    """`[VOCAB_SIZE]`, with few likely tokens that depend on little: texts go round until a penalty stops them."""
    key = hashlib.blake2b(f"{path}|{history[-1] % 4}".encode(), digest_size=4).digest()
    logits = np.random.default_rng(list(key)).standard_normal(VOCAB_SIZE).astype(np.float32)
    logits[:8] += 3.0
    return torch.from_numpy(logits)


def solo_output(prompt: Sequence[int], sampling: SamplingSpec, path: str, choice: int) -> list[int]:
    """What a sequence gives alone, each token known before the next is sampled, adjusted one by one."""
    plain = msgspec.structs.replace(
        sampling,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        logit_bias={},
        bad_words=[],
        min_tokens=0,
    )
    sampler = Sampler(vocab_size=VOCAB_SIZE, device=CPU)
    history = list(prompt)
    end = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else sampling.eos_token_ids)}
    while len(history) - len(prompt) < sampling.max_tokens:
        logits = adjusted_one_by_one(fake_logits(history, path), history, len(prompt), sampling)
        row = make_row(plain, history=history, prompt=len(prompt), choice=choice)
        history.append(int(sampler.sample(logits[None], [row]).packed[0, 0]))
        if history[-1] in end:
            break
    return history[len(prompt) :]


class SamplingRunner(FakeRunner):
    """Samples `fake_logits` with the real sampler, which is told of late tokens as a device would tell it."""

    def __init__(self, *, num_pages: int, page_size: int, slab: FakeSlab | None = None) -> None:
        super().__init__(num_pages=num_pages, page_size=page_size, slab=slab)
        self._sampler = Sampler(vocab_size=VOCAB_SIZE, device=CPU)
        self._packed: Tensor | None = None
        self._launching: StepPlan | None = None
        self.late_rows: list[RowPlan] = []

    def launch(self, plan: StepPlan) -> StepHandle:
        self._launching = plan
        return super().launch(plan)

    def release_sequence(self, sequence_id: int) -> None:
        super().release_sequence(sequence_id)
        self._sampler.release(sequence_id)

    def _run(self, plan: StepPlan) -> StepResult:
        """`plan` has every token; the sampler gets the rows as they were planned."""
        assert self._launching is not None
        result = super()._run(plan)
        rows = [row for row in self._launching.rows if row.sample]
        if not rows:
            self._packed = None
            return result
        known = [row for row in plan.rows if row.sample]
        logits = torch.stack([fake_logits(row.history, self._slab.read(row.slot)) for row in known])
        self._packed = self._sampler.sample(logits, rows, self._packed).packed[:, 0]
        self.late_rows.extend(row for row in rows if row.source >= 0)
        tokens = iter(self._packed.tolist())
        return StepResult(
            rows=[
                dataclasses.replace(given, token_id=next(tokens)) if row.sample else given
                for row, given in zip(plan.rows, result.rows, strict=True)
            ],
            seconds=result.seconds,
        )
