"""What comes back from the device, read on the host."""

import math

import torch

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.model_runner import _Launched
from loramux_server.engine.plan import RowPlan, RowResult, StepPlan
from loramux_server.engine.sampler import Sampler

VOCAB = 20


def make_row(sequence_id: int, targets: list[int], *, sample: bool) -> RowPlan:
    return RowPlan(
        sequence_id=sequence_id,
        token_ids=targets or [0],
        start=0,
        pages=[1],
        slot=-1,
        sample=sample,
        sampling=SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=2),
        choice=0,
        position=len(targets),
        history=[],
        prompt_length=4,
        prompt_logprobs=2 if targets else None,
        prompt_targets=targets,
    )


def results(rows: list[RowPlan], prompt_logits: torch.Tensor, *, parts: int) -> list[RowResult]:
    sampler = Sampler(vocab_size=VOCAB, device=torch.device("cpu"))
    sampled_rows = [row for row in rows if row.sample]
    sampled = sampler.sample(torch.zeros(len(sampled_rows), VOCAB), sampled_rows)
    targets = torch.tensor([target for row in rows for target in row.prompt_targets])
    prompts = [
        sampler.prompt_logprobs(logits, part, 2)
        for logits, part in zip(prompt_logits.chunk(parts), targets.chunk(parts), strict=True)
    ]
    launched = _Launched(StepPlan(step=1, rows=rows), sampled.packed, sampled.top, prompts, 2, None, {})
    return list(launched.result().rows)


def test_prompt_logprobs_go_to_their_rows() -> None:
    rows = [make_row(0, [], sample=True), make_row(1, [3, 4, 5], sample=False), make_row(2, [6, 7], sample=True)]
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))
    decode, inner, last = results(rows, logits, parts=2)
    expected = logits.log_softmax(-1)
    assert decode.token_id == 0 and decode.prompt_logprobs == () and decode.finite
    assert inner.token_id is None and last.token_id == 0
    entries = [*inner.prompt_logprobs, *last.prompt_logprobs]
    assert [len(inner.prompt_logprobs), len(last.prompt_logprobs)] == [3, 2]
    for row, (entry, target) in enumerate(zip(entries, [3, 4, 5, 6, 7], strict=True)):
        assert math.isclose(entry.logprob, float(expected[row, target]), abs_tol=1e-5)
        assert [token for token, _ in entry.top] == expected[row].topk(2).indices.tolist()


def test_a_bad_row_of_prompt_logits_makes_its_sequence_non_finite_alone() -> None:
    rows = [make_row(0, [3, 4], sample=False), make_row(1, [5, 6], sample=True)]
    for bad in (math.nan, math.inf):
        logits = torch.randn(4, VOCAB)
        logits[1, 9] = bad
        first, second = results(rows, logits, parts=1)
        assert not first.finite and second.finite
