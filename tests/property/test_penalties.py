"""Random requests with penalties and bans, steps ahead, preemption and failures: each gives what it gives alone."""

import random
from collections import Counter
from typing import Any

import pytest

from loramux_server.engine.messages import Abort
from tests.support import engine_driver
from tests.support.engine_driver import Driver
from tests.support.fake_runner import FakeSlab
from tests.support.penalty_cases import SamplingRunner, solo_output

VERSIONS = ["v0", "v1"]


def build(rng: random.Random) -> tuple[Driver, SamplingRunner]:
    page_size = rng.choice([1, 2, 4])
    runner = SamplingRunner(
        num_pages=rng.randint(44, 80) // page_size,
        page_size=page_size,
        slab=FakeSlab(rank_units=2, max_slots=2),
    )
    often = rng.choice([0.0, 0.05, 0.15])
    faults = random.Random(rng.random())
    runner.out_of_memory = lambda plan: faults.random() < often and plan.num_tokens > 1
    driver = Driver(
        runner=runner,
        schedule_ahead=True,
        max_running=rng.randint(4, 10),
        max_batch_tokens=rng.randint(12, 40),
        prefill_chunk=rng.randint(2, 12),
        prefix_cache=rng.random() < 0.8,
    )
    driver.put(*VERSIONS)
    return driver, runner


def random_fields(rng: random.Random) -> dict[str, Any]:
    """Sampling in which all that names tokens comes together with all else."""
    words = [[rng.randrange(8) for _ in range(rng.randint(1, 3))] for _ in range(rng.choice([0, 0, 2, 12]))]
    return {
        "temperature": rng.choice([0.0, 0.0, 0.8]),
        "top_k": rng.choice([0, 0, 5]),
        "seed": rng.randrange(4),
        "n": rng.choice([1, 1, 2, 3]),
        "max_tokens": rng.randint(1, 18),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.4, 0.8]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.7, -0.4]),
        "frequency_penalty": rng.choice([0.0, 0.0, 0.5, -0.3]),
        "logit_bias": rng.choice([{}, {}, {rng.randrange(8): 1.5, rng.randrange(64): -2.0}]),
        # Not every likely token may be banned on its own.
        "bad_words": [word for word in words if len(word) > 1 or word[0] < 3],
        "min_tokens": rng.choice([0, 0, 3]),
        "eos_token_ids": rng.choice([[], [rng.randrange(8)]]),
        "stop_token_ids": rng.choice([[], [rng.randrange(8)]]),
        "ignore_eos": rng.random() < 0.2,
    }


def load(seed: int) -> tuple[Driver, SamplingRunner]:
    """Run a whole history; returns the driver and its runner at rest."""
    rng = random.Random(seed)
    driver, runner = build(rng)
    for number in range(30):
        for _ in range(rng.choice([0, 1, 2])):
            prompt = [rng.randrange(8) for _ in range(rng.randint(1, 14))]
            version = rng.choice([None, *VERSIONS])
            driver.add(f"r{len(driver.requests)}", prompt, version=version, **random_fields(rng))
        alive = [name for name, transcript in driver.requests.items() if transcript.done is None]
        if alive and number % 7 == 0:
            driver.engine.handle([Abort(request_id=rng.choice(alive))])
        elif alive and number % 7 == 3:
            name = rng.choice(alive)
            if tokens := driver.requests[name].tokens:
                index = rng.choice(sorted(tokens))
                driver.stop(name, index, rng.randint(1, len(tokens[index])))
        driver.step(rng.randint(1, 6))
    driver.run()
    return driver, runner


@pytest.mark.parametrize("seed", range(16))
def test_load(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_driver, "solo_output", solo_output)
    driver, _ = load(seed)
    driver.judge()
    driver.assert_at_rest()


def test_the_load_is_heavy() -> None:
    """The histories above reach preemption, end tokens, and late tokens under all that names tokens."""
    preemptions = stopped = 0
    late: Counter[str] = Counter()
    for seed in range(6):
        driver, runner = load(seed)
        preemptions += driver.engine.stats().preemptions
        ends = [end for transcript in driver.requests.values() for end in transcript.finished.values()]
        stopped += sum(end.reason == "stop" for end in ends)
        for row in runner.late_rows:
            assert row.sampling is not None
            late["repetition"] += row.sampling.repetition_penalty != 1.0
            late["presence"] += row.sampling.presence_penalty != 0.0
            late["frequency"] += row.sampling.frequency_penalty != 0.0
            late["words"] += any(len(word) > 1 for word in row.sampling.bad_words)
            late["bias"] += bool(row.sampling.logit_bias)
    assert preemptions > 5 and stopped > 40, (preemptions, stopped)
    assert len(late) == 5 and min(late.values()) > 200, late
