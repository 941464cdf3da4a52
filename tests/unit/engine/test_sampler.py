"""The sampler against exact distributions: nothing here knows how it draws."""

import math

import pytest
import torch

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.plan import RowPlan
from loramux_server.engine.sampler import Sampler, unpack_logprobs

VOCAB = 50


def make_row(
    spec: SamplingSpec, *, position: int = 8, choice: int = 0, history: tuple[int, ...] = (1, 2, 3), prompt: int = 3
) -> RowPlan:
    return RowPlan(
        sequence_id=0,
        token_ids=[0],
        start=0,
        pages=[1],
        slot=-1,
        sample=True,
        sampling=spec,
        choice=choice,
        position=position,
        history=history,
        prompt_length=prompt,
    )


def make_spec(**fields: object) -> SamplingSpec:
    return SamplingSpec(**{"max_tokens": 16, "temperature": 0.0, **fields})  # type: ignore[arg-type]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 2


@pytest.fixture
def sampler() -> Sampler:
    return Sampler(vocab_size=VOCAB, device=torch.device("cpu"))


def draw(sampler: Sampler, logits: torch.Tensor, spec: SamplingSpec, count: int) -> torch.Tensor:
    """Frequencies of `count` draws, one position each."""
    rows = [make_row(spec, position=position) for position in range(count)]
    tokens = sampler.sample(logits.expand(count, -1), rows).packed[:, 0]
    return torch.bincount(tokens.long(), minlength=VOCAB) / count


def exact(logits: torch.Tensor, spec: SamplingSpec) -> torch.Tensor:
    """The distribution by sorting, the plain way."""
    scaled = logits[0].double() / spec.temperature
    order = scaled.argsort(descending=True)
    keep = torch.ones(VOCAB, dtype=torch.bool)
    if spec.top_k:
        keep[order[spec.top_k :]] = False
    probabilities = torch.where(keep, scaled, -math.inf).softmax(-1)
    before = probabilities[order].cumsum(0) - probabilities[order]
    keep[order[before >= spec.top_p]] = False
    keep &= scaled.softmax(-1) >= spec.min_p * scaled.softmax(-1).max()
    return torch.where(keep, scaled, -math.inf).softmax(-1)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 10_000},
    ],
)
def test_frequencies_match_the_exact_distribution(
    sampler: Sampler, logits: torch.Tensor, fields: dict[str, float]
) -> None:
    spec = make_spec(seed=7, **fields)
    expected = exact(logits, spec)
    count = 20_000
    seen = draw(sampler, logits, spec, count)
    assert (seen[expected == 0] == 0).all(), "a filtered token was drawn"
    # Five standard deviations of a binomial, and one token for the smallest probabilities.
    bound = 5 * (expected * (1 - expected) / count).sqrt() + 1 / count
    assert ((seen - expected).abs() <= bound).all()


def test_a_token_depends_on_seed_choice_and_position_only(sampler: Sampler, logits: torch.Tensor) -> None:
    spec = make_spec(temperature=1.0, seed=11)
    alone = sampler.sample(logits, [make_row(spec, position=4)]).packed[0, 0]
    others = torch.randn(31, VOCAB)
    rows = [make_row(make_spec(temperature=0.7, top_p=0.5, seed=index, top_k=3)) for index in range(31)]
    mixed = sampler.sample(torch.cat([others, logits]), [*rows, make_row(spec, position=4)]).packed[-1, 0]
    assert alone == mixed
    varied = {
        int(
            sampler.sample(
                logits, [make_row(make_spec(temperature=1.0, seed=seed), position=position, choice=choice)]
            ).packed[0, 0]
        )
        for seed in (1, 2, 3)
        for position in (1, 2, 3)
        for choice in (0, 1, 2)
    }
    assert len(varied) > 3


def test_greedy_rows_are_untouched_by_sampled_neighbours(sampler: Sampler) -> None:
    logits = torch.randn(6, VOCAB)
    rows = [make_row(make_spec(temperature=float(index % 2), seed=index)) for index in range(6)]
    tokens = sampler.sample(logits, rows).packed[:, 0]
    assert torch.equal(tokens[::2].long(), logits.argmax(-1)[::2])


def test_penalties_bias_and_bans_match_their_definitions(sampler: Sampler, logits: torch.Tensor) -> None:
    history = (4, 4, 9, 9, 9, 12)  # prompt 4 4, output 9 9 9 12
    spec = make_spec(
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={20: 100.0, 21: -5.0},
        bad_words=[[9, 12, 20], [33]],
    )
    row = make_row(spec, history=history, prompt=2)
    adjusted = sampler._adjust(logits, [row], [spec])[0]
    expected = logits[0].clone()
    for token, count in {4: 0, 9: 3, 12: 1}.items():
        value = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
        expected[token] = value - 0.2 * count - (0.3 if count else 0.0)
    expected[20], expected[21], expected[33] = -math.inf, expected[21] - 5.0, -math.inf
    torch.testing.assert_close(adjusted, expected)
    assert torch.equal(logits, logits.clone()), "raw logits stay raw"


def test_min_tokens_masks_end_and_stop_tokens(sampler: Sampler, logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    spec = make_spec(eos_token_ids=[best], min_tokens=2)
    assert sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 5))]).packed[0, 0] != best
    assert sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 5, 6))]).packed[0, 0] == best
    ignoring = make_spec(eos_token_ids=[best], min_tokens=2, ignore_eos=True)
    assert sampler.sample(logits, [make_row(ignoring)]).packed[0, 0] == best


def test_non_finite_rows_are_flagged_alone(sampler: Sampler) -> None:
    logits = torch.randn(4, VOCAB)
    logits[1, 3] = math.nan
    logits[2, 7] = math.inf
    packed = sampler.sample(logits, [make_row(make_spec(temperature=float(i == 3), seed=1)) for i in range(4)]).packed
    assert packed[:, 1].tolist() == [1, 0, 0, 1]
    assert ((packed[:, 0] >= 0) & (packed[:, 0] < VOCAB)).all()


def test_logprobs_are_of_the_raw_logits(sampler: Sampler, logits: torch.Tensor) -> None:
    rows = [
        make_row(make_spec(logprobs=3, logit_bias={17: 50.0})),
        make_row(make_spec()),
        make_row(make_spec(logprobs=0)),
    ]
    sampled = sampler.sample(logits.expand(3, -1), rows)
    with_top, without, chosen_only = unpack_logprobs(sampled.packed[:, 2:], sampled.top, [3, None, 0])
    expected = logits[0].log_softmax(-1)
    assert without is None
    assert with_top is not None and chosen_only is not None
    assert with_top.logprob == pytest.approx(float(expected[17]), abs=1e-5)
    best = expected.topk(3)
    assert [token for token, _ in with_top.top] == best.indices.tolist()
    assert [value for _, value in with_top.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert chosen_only.top == [] and chosen_only.logprob == pytest.approx(float(expected.max()), abs=1e-5)


def test_released_sequences_start_their_counts_again(sampler: Sampler, logits: torch.Tensor) -> None:
    spec = make_spec(presence_penalty=1.0)
    sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 40))])
    sampler.release(0)
    adjusted = sampler._adjust(logits, [make_row(spec, history=(1, 2, 3))], [spec])
    torch.testing.assert_close(adjusted, logits)
