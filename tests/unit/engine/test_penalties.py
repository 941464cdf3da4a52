"""Penalties, bias and bans against their definitions, with the last token known and with it late on the device."""

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.penalties import Penalties
from loramux_server.engine.plan import RowPlan, StepPlan
from tests.support.engine_runs import Job, RealEngine
from tests.support.penalty_cases import CPU, adjusted_one_by_one, make_row, make_spec
from tests.support.tiny_models import make_checkpoint

VOCAB = 50
EVERYTHING: dict[str, object] = {
    "repetition_penalty": 1.5,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {20: 100.0, 21: -5.0, 9: 0.25},
    "bad_words": [[9, 12, 20], [33], [12, 14], [40, 14], [12, 4, 15]],
    "min_tokens": 6,
    "eos_token_ids": [44],
    "stop_token_ids": [45],
}


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 2


@pytest.fixture
def penalties() -> Penalties:
    return Penalties(vocab_size=VOCAB, device=CPU)


def adjust_late(penalties: Penalties, logits: Tensor, spec: SamplingSpec, history: list[int], prompt: int) -> Tensor:
    """The row's logits when the last token of `history` is late."""
    row = make_row(spec, history=history[:-1], prompt=prompt, source=1)
    return penalties.adjust(logits, [row], torch.tensor([7, history[-1], 8], dtype=torch.int32))[0]


def test_penalties_bias_and_bans_match_their_definitions(penalties: Penalties, logits: Tensor) -> None:
    history = (4, 4, 9, 9, 9, 12)  # prompt 4 4, output 9 9 9 12
    spec = make_spec(
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={20: 100.0, 21: -5.0},
        bad_words=[[9, 12, 20], [33]],
    )
    raw = logits.clone()
    adjusted = penalties.adjust(logits, [make_row(spec, history=history, prompt=2)])[0]
    expected = logits[0].clone()
    for token, count in {4: 0, 9: 3, 12: 1}.items():
        value = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
        expected[token] = value - 0.2 * count - (0.3 if count else 0.0)
    expected[20], expected[21], expected[33] = -math.inf, expected[21] - 5.0, -math.inf
    torch.testing.assert_close(adjusted, expected)
    assert torch.equal(logits, raw), "raw logits stay raw"


def subsets() -> Iterator[dict[str, object]]:
    for size in range(len(EVERYTHING) + 1):
        for names in itertools.combinations(EVERYTHING, size):
            yield {name: EVERYTHING[name] for name in names}


@pytest.mark.parametrize("last", [4, 9, 12, 20, 31, 40])
def test_a_late_token_changes_what_a_known_one_does(penalties: Penalties, logits: Tensor, last: int) -> None:
    """`last` is of the prompt, of the output, biased, new, or completes all but the end of a bad word."""
    history = [4, 4, 12, 9, 12, 9, last]
    for number, fields in enumerate(subsets()):
        spec = make_spec(**fields)
        expected = adjusted_one_by_one(logits[0], history, 2, spec)
        known = penalties.adjust(logits, [make_row(spec, history=history, prompt=2, sequence_id=number)])[0]
        assert torch.equal(known, expected), fields
        assert torch.equal(adjust_late(penalties, logits, spec, history, 2), expected), fields


def test_rows_with_known_and_late_tokens_mix(penalties: Penalties) -> None:
    rng = random.Random(1)
    batch = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(1))
    sampled = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    rows: list[RowPlan] = []
    expected: list[Tensor] = []
    for index in range(40):
        spec = make_spec(**{name: EVERYTHING[name] for name in EVERYTHING if rng.random() < 0.5})
        history = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
        prompt = rng.randint(1, len(history))
        source = rng.choice([-1, rng.randrange(40)])
        rows.append(make_row(spec, history=history, prompt=prompt, source=source, sequence_id=index))
        known = history if source < 0 else [*history, int(sampled[source])]
        expected.append(adjusted_one_by_one(batch[index], known, prompt, spec))
    assert torch.equal(penalties.adjust(batch, rows, sampled), torch.stack(expected))


def test_a_token_that_ends_several_words_is_banned_by_either(penalties: Penalties, logits: Tensor) -> None:
    spec = make_spec(bad_words=[[1, 7], [2, 7], [3, 7], [5, 2, 7]])
    for last, banned in ((1, True), (2, True), (3, True), (4, False)):
        adjusted = adjust_late(penalties, logits, spec, [9, last], 1)
        assert bool(adjusted[7] == -math.inf) == banned
        assert torch.equal(adjusted[:7], logits[0, :7]) and torch.equal(adjusted[8:], logits[0, 8:])


def test_late_words_with_foreign_ids_ban_nothing(penalties: Penalties, logits: Tensor) -> None:
    spec = make_spec(bad_words=[[1, VOCAB], [VOCAB + 1, 6], [1, 1, 1, 1, 6], []])
    assert torch.equal(adjust_late(penalties, logits, spec, [1, 1, 1], 1), logits[0])


def test_a_step_that_is_run_again_counts_nothing_twice(penalties: Penalties, logits: Tensor) -> None:
    spec = make_spec(frequency_penalty=0.5, presence_penalty=0.25)
    history = [1, 2, 9, 9]
    first = adjust_late(penalties, logits, spec, history, 2)
    assert torch.equal(adjust_late(penalties, logits, spec, history, 2), first), "launched again behind the same step"
    other = adjust_late(penalties, logits, spec, [1, 2, 9, 30], 2)
    assert torch.equal(other, adjusted_one_by_one(logits[0], [1, 2, 9, 30], 2, spec)), "another token came of it"
    known = penalties.adjust(logits, [make_row(spec, history=history, prompt=2)])[0]
    assert torch.equal(known, first), "run again with the token known"


def test_a_row_whose_late_token_is_missing_is_an_error(penalties: Penalties, logits: Tensor) -> None:
    for fields in ({"presence_penalty": 0.5}, {"bad_words": [[1, 2, 3]]}):
        spec = make_spec(**fields)
        with pytest.raises(AssertionError, match="1 tokens are late, source -1"):
            penalties.adjust(logits, [make_row(spec, position=4)])
        with pytest.raises(AssertionError, match="2 tokens are late, source 0"):
            penalties.adjust(logits, [make_row(spec, position=5, source=0)], torch.tensor([1]))


def test_nothing_is_copied_when_no_row_asks(penalties: Penalties, logits: Tensor) -> None:
    rows = [make_row(make_spec(min_tokens=1, eos_token_ids=[3]), history=(1, 2, 3, 4)), make_row(make_spec(), source=0)]
    batch = logits.expand(2, -1)
    assert penalties.adjust(batch, rows, torch.tensor([1])) is batch


def test_released_sequences_start_their_counts_again(penalties: Penalties, logits: Tensor) -> None:
    spec = make_spec(presence_penalty=1.0)
    penalties.adjust(logits, [make_row(spec, history=(1, 2, 3, 40))])
    penalties.release(0)
    adjusted = penalties.adjust(logits, [make_row(spec, history=(5, 6, 7, 8, 41), prompt=4)])[0]
    assert torch.equal(adjusted, adjusted_one_by_one(logits[0], [5, 6, 7, 8, 41], 4, spec))


def test_counts_follow_a_growing_history(penalties: Penalties) -> None:
    generator = torch.Generator().manual_seed(2)
    history = torch.randint(0, VOCAB, (300,), generator=generator).tolist()
    spec = make_spec(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.1)
    flat = torch.ones(1, VOCAB)
    for length in (1, 40, 41, 200, 300, 30, 45):
        adjusted = penalties.adjust(flat, [make_row(spec, history=tuple(history[:length]), prompt=40)])[0]
        output = history[40:length]
        for token in range(VOCAB):
            wanted = 1 / 1.2 if token in history[:length] else 1.0
            wanted -= 0.1 * output.count(token) + 0.4 * (token in output)
            assert float(adjusted[token]) == pytest.approx(wanted, abs=1e-5)


def test_a_model_with_steps_ahead_gives_what_one_after_the_other_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    rng = random.Random(4)
    jobs = []
    for number in range(12):
        fields = {
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "presence_penalty": rng.choice([0.0, 2.0]),
            "frequency_penalty": rng.choice([0.0, 1.0]),
            "bad_words": rng.choice([[], [[a, b] for a in range(3, 9) for b in range(0, 512, 3)]]),
            "temperature": rng.choice([0.0, 0.7]),
            "seed": number,
            "max_tokens": 20,
        }
        prompt = tuple(rng.randrange(3, 9) for _ in range(rng.randint(1, 12)))
        jobs.append(Job(prompt=prompt, fields=tuple(fields.items())))
    outputs = []
    late = 0
    for ahead in (True, False):
        engine = RealEngine(
            EngineConfig(
                model=str(base),
                weights="fp32",
                device="cpu",
                threads=1,
                self_test=False,
                batch_invariant=True,
                max_model_len=64,
                page_size=4,
                kv_pages=200,
                max_running=12,
                schedule_ahead=ahead,
            )
        )
        launch = engine.runner.launch

        def counting(plan: StepPlan, launch: object = launch) -> object:
            nonlocal late
            late += sum(row.source >= 0 for row in plan.rows)
            return launch(plan)  # type: ignore[operator]

        monkeypatch.setattr(engine.runner, "launch", counting)
        outputs.append(engine.run(jobs))
        engine.close()
    assert late == sum(len(output) - 1 for output in outputs[0])
    assert outputs[0] == outputs[1]
