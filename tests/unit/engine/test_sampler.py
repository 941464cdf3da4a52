"""The sampler against exact distributions: nothing here knows how it draws."""

import math

import pytest
import torch

from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.sampler import Sampler, unpack_logprobs
from tests.support.penalty_cases import make_row, make_spec

VOCAB = 50


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


def test_min_tokens_masks_end_and_stop_tokens(sampler: Sampler, logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    spec = make_spec(eos_token_ids=[best], min_tokens=2)
    assert sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 5))]).packed[0, 0] != best
    assert sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 5, 6))]).packed[0, 0] == best
    late = make_row(spec, history=(1, 2, 3, 5), position=5)
    assert sampler.sample(logits, [late]).packed[0, 0] == best, "a token still on the device counts"
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


def test_everything_banned_still_gives_a_token_of_the_vocabulary(sampler: Sampler, logits: torch.Tensor) -> None:
    every = [[token] for token in range(VOCAB)]
    for fields in ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.5, "top_k": 3, "min_p": 0.1}):
        packed = sampler.sample(logits, [make_row(make_spec(bad_words=every, **fields))]).packed
        assert 0 <= packed[0, 0] < VOCAB and packed[0, 1] == 1


def test_words_longer_than_the_history_empty_ones_and_foreign_ids_ban_nothing(
    sampler: Sampler, logits: torch.Tensor
) -> None:
    best = int(logits.argmax())
    spec = make_spec(
        bad_words=[[9] * 40 + [best], [], [VOCAB], [VOCAB + 7]],
        stop_token_ids=[VOCAB, 2 * VOCAB],
        eos_token_ids=[VOCAB + best],
        logit_bias={VOCAB + 1: 100.0},
        min_tokens=5,
    )
    # A foreign id in the first row must not reach into the second one either.
    rows = [make_row(spec), make_row(make_spec())]
    assert sampler.sample(logits.expand(2, -1), rows).packed[:, 0].tolist() == [best, best]


def test_a_bias_on_an_end_token_does_not_undo_min_tokens(sampler: Sampler, logits: torch.Tensor) -> None:
    spec = make_spec(eos_token_ids=[6], logit_bias={6: 100.0}, min_tokens=2)
    assert sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 5))]).packed[0, 0] != 6
    assert sampler.sample(logits, [make_row(spec, history=(1, 2, 3, 5, 7))]).packed[0, 0] == 6


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-40}, {"temperature": 1e-9}, {"top_p": 1e-12, "temperature": 1.0}]
)
def test_extreme_settings_are_greedy(sampler: Sampler, logits: torch.Tensor, fields: dict[str, float]) -> None:
    seen = draw(sampler, logits, make_spec(seed=3, **fields), 200)
    assert seen[logits.argmax()] == 1.0


def test_a_top_k_past_the_vocabulary_is_off_and_leaves_its_neighbours_alone(
    sampler: Sampler, logits: torch.Tensor
) -> None:
    free = make_spec(temperature=3.0, seed=5)
    wide, narrow = (make_spec(temperature=3.0, seed=5, top_k=top_k) for top_k in (2**31 - 1, 2))
    rows = [make_row(spec, position=position) for position in range(200) for spec in (free, wide, narrow)]
    tokens = sampler.sample(logits.expand(len(rows), -1), rows).packed[:, 0].view(-1, 3)
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    assert set(tokens[:, 2].tolist()) <= set(logits[0].topk(2).indices.tolist())


def test_seeds_use_all_64_bits_and_choices_differ(sampler: Sampler) -> None:
    flat = torch.zeros(1, VOCAB)
    seeds = (0, 1, 2**63 - 1, 2**63, 2**64 - 1)
    rows = [
        make_row(make_spec(temperature=1.0, seed=seed), choice=choice, position=position)
        for seed in seeds
        for choice in range(3)
        for position in range(12)
    ]
    tokens = sampler.sample(flat.expand(len(rows), -1), rows).packed[:, 0].view(len(seeds) * 3, 12)
    assert len({tuple(row) for row in tokens.tolist()}) == len(seeds) * 3


@pytest.mark.parametrize("top_k", [9, 30, 49])
def test_a_large_top_k_is_searched_and_keeps_the_same_tokens(
    sampler: Sampler, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, top_k: int
) -> None:
    specs = [make_spec(temperature=2.0, seed=4, top_k=k, top_p=0.9) for k in (top_k, 3, 0)]
    rows = [make_row(spec, position=position) for position in range(150) for spec in specs]
    batch = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(top_k)) * 3
    batch[::7, :20] = -math.inf  # fewer tokens than k are left
    sorted_best = sampler.sample(batch, rows).packed[:, 0]
    monkeypatch.setattr("loramux_server.kernels.sampling._SORTED_TOP_K", 8)
    assert torch.equal(sampler.sample(batch, rows).packed[:, 0], sorted_best)
    alone = [int(sampler.sample(batch[i : i + 1], rows[i : i + 1]).packed[0, 0]) for i in range(0, 60)]
    assert alone == sorted_best[:60].tolist()
