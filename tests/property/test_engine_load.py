"""Heavy random load from seeds: tiny pools and many adapters, so that preemption and eviction happen all the time."""

import itertools
import random

import pytest

from loramux_server.engine.messages import Abort, DropVersion, Preload, Unload
from loramux_server.engine.request_table import RequestTable
from tests.support.engine_driver import Driver, make_driver

VERSIONS = [f"v{index}" for index in range(8)]
STEMS = [[], list(range(1, 11)), [*range(1, 7), *range(20, 30)]]


def build(rng: random.Random, *, host_size: int = 1) -> Driver:
    driver = make_driver(
        pages=rng.randint(12, 20),
        page_size=rng.choice([2, 4]),
        rank_units=6,
        max_slots=rng.randint(2, 5),
        units={f"/{name}": rng.randint(1, 4) for name in VERSIONS},
        delay=rng.randint(0, 4),
        host_size=host_size,
        max_running=rng.randint(3, 10),
        max_batch_tokens=rng.randint(8, 40),
        prefill_chunk=rng.randint(2, 12),
        prefix_cache=rng.random() < 0.8,
        schedule_ahead=rng.random() < 0.6,
    )
    driver.put(*VERSIONS)
    driver.alias("a", ("v0", 1.0), ("v1", 2.0))
    often = rng.choice([0.0, 0.03, 0.1])
    faults = random.Random(rng.random())
    # Any step may run out of memory, but no row alone: that would fail its request.
    driver.runner.out_of_memory = lambda plan: faults.random() < often and plan.num_tokens > 1
    return driver


def add(driver: Driver, rng: random.Random, number: int) -> None:
    pool_tokens = driver.engine.limits.max_model_len
    prompt = (rng.choice(STEMS) + [rng.randint(0, 3) for _ in range(rng.randint(1, 6))])[: pool_tokens // 2]
    kind = rng.random()
    prompt_logprobs = rng.choice([None, None, None, 0])
    driver.add(
        f"r{number}",
        prompt,
        max_tokens=rng.randint(1, pool_tokens // 2),
        n=rng.choice([1, 1, 2, 3]),
        seed=rng.randint(0, 3),
        alias="a" if kind < 0.3 else None,
        version=rng.choice(VERSIONS) if kind > 0.5 else None,
        split_key=rng.choice(["", "user1", "user2"]),
        fairness_key=rng.choice(["x", "y", "z"]),
        weight=rng.choice([1.0, 2.0]),
        priority=rng.randint(0, 2),
        stop_token_ids=rng.sample(range(64), rng.choice([0, 2])),
        min_tokens=rng.randint(0, 2),
        prompt_logprobs=prompt_logprobs,
        bad_words=rng.choice([[], [], [], [[3]], [[1, 2]]]),
        time_left=rng.choice([None, None, None, 0.02, 1.5]),
        # Those of a prompt that is cut short are not all given.
        soft_time_limit=rng.choice([None, None, 0.02, 1.5]) if prompt_logprobs is None else None,
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.0, 0.5]),
        salt=rng.choice([b"s", b"t"]),
    )


def disturb(driver: Driver, rng: random.Random, number: int) -> int:
    """One random disturbance; returns how many operations it began."""
    alive = [name for name, transcript in driver.requests.items() if transcript.done is None]
    version = rng.choice(VERSIONS)
    kind = rng.randrange(10)
    if kind == 0 and alive:
        driver.engine.handle([Abort(request_id=rng.choice(alive))])
    elif kind <= 2 and alive:
        request_id = rng.choice(alive)
        tokens = driver.requests[request_id].tokens
        if tokens:
            index = rng.choice(sorted(tokens))
            driver.stop(request_id, index, rng.randint(1, len(tokens[index])))
    elif kind == 3:
        targets = [(name, rng.choice([1.0, 3.0])) for name in rng.sample(VERSIONS, 2)]
        driver.alias("a", *targets, revision=number + 2)
    elif kind == 4:
        driver.engine.handle([DropVersion(version=version)])
        if rng.random() < 0.8:
            driver.put(version)
    elif kind == 5:
        driver.engine.handle([rng.choice([Preload, Unload])(operation_id=f"o{number}", version=version)])
        return 1
    elif kind == 6:
        failing = driver.runner.slab.failing
        if failing.pop(f"/{version}", None) is None and rng.random() < 0.3:
            failing[f"/{version}"] = OSError("gone")
    elif kind == 7:
        driver.runner.token_capacity = rng.choice([None, None, 3, 8])
    elif kind == 8:
        driver.runner.non_finite_paths.symmetric_difference_update([f"/{version}"])
    else:
        driver.clock.now += rng.choice([0.01, 1.0])
        driver.runner.slab.lose(f"/{version}")
    return 0


def load(seed: int, *, host_size: int = 1) -> tuple[Driver, int]:
    """Run a whole history; returns the driver at rest and how many operations it was asked for."""
    rng = random.Random(seed)
    driver = build(rng, host_size=host_size)
    operations = 0
    for number in range(60):
        for _ in range(rng.choice([0, 1, 1, 2])):
            add(driver, rng, len(driver.requests))
        operations += disturb(driver, rng, number)
        driver.step(rng.randint(1, 6))
    driver.runner.slab.failing.clear()
    driver.runner.non_finite_paths.clear()
    driver.clock.now += 20.0
    driver.run()
    return driver, operations


def assert_charged_once(driver: Driver) -> None:
    """Every token that a request needed was computed once and charged once: none twice, none behind an end."""
    for transcript in driver.requests.values():
        done = transcript.done
        assert done is not None
        cut = bool(transcript.stops) or any(end.reason == "time_limit" for end in transcript.finished.values())
        if done.status == "finished" and not done.preemptions and not cut:
            prompt = len(transcript.add.prompt_token_ids) - 1 - done.cached_tokens
            assert done.computed_tokens == prompt + sum(len(tokens) for tokens in transcript.tokens.values())


@pytest.mark.parametrize("seed", range(40))
def test_load(seed: int) -> None:
    driver, operations = load(seed)
    driver.judge()
    assert_charged_once(driver)
    driver.assert_at_rest()
    assert len(driver.completed) == operations
    driver.engine.handle([DropVersion(version=name) for name in VERSIONS])
    driver.run()
    assert driver.runner.slab.resident == {} and driver.runner.slab.host == set()
    last = {state.version: state for state in driver.states}
    assert {(state.residency, state.dropped) for state in last.values()} == {("store", True)}


@pytest.mark.parametrize("seed", range(40, 52))
def test_passes_that_are_skipped_would_have_started_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each pass hints again what the host has lost, which starts nothing.
    skipping, _ = load(seed, host_size=0)
    always = itertools.count()
    monkeypatch.setattr(RequestTable, "changes", property(lambda self: next(always)))
    trying, _ = load(seed, host_size=0)
    assert skipping.events == trying.events


def test_the_load_is_heavy() -> None:
    """The histories above do reach preemption, eviction, forks and prefix hits; otherwise they prove nothing."""
    totals: dict[str, int] = {}
    copies = 0
    for seed in range(10):
        rng = random.Random(seed)
        driver = build(rng)
        for _ in range(60):
            add(driver, rng, len(driver.requests))
            driver.step(3)
        driver.run()
        stats = driver.engine.stats()
        for name in ("preemptions", "adapter_evictions", "prefix_hit_tokens", "requests_finished"):
            totals[name] = totals.get(name, 0) + getattr(stats, name)
        copies += sum(len(plan.copies) for plan in driver.runner.plans)
    assert totals["preemptions"] > 50 and totals["adapter_evictions"] > 50
    assert totals["prefix_hit_tokens"] > 100 and totals["requests_finished"] > 200 and copies > 50
