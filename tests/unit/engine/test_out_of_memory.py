"""Launches of a real model that run out of memory: the others' tokens stay, requests end once, nothing is kept."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.plan import OutOfMemory, StepPlan
from tests.support.engine_runs import Job, RealEngine, record_eagerly
from tests.support.fault_runs import POINTS, Outcome, OutOfMemoryIn, Rule, mixed_jobs, prefills, serve
from tests.support.tiny_models import make_adapter, make_checkpoint

JOBS = mixed_jobs(12, adapters=3, vocab=500, seed=2, longest=24)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("memory")
    base = make_checkpoint(root / "base", layers=1)
    return base, [make_adapter(root / f"a{seed}", base, seed=seed, rank=rank) for seed, rank in enumerate((4, 16, 20))]


@pytest.fixture(scope="module", params=["eager", "eager, ahead", "graphs", "graphs, ahead"])
def real(request: pytest.FixtureRequest, files: tuple[Path, list[Path]]) -> Iterator[RealEngine]:
    base, adapters = files
    config = EngineConfig(
        model=str(base),
        weights="fp32",
        device="cpu",
        threads=1,
        self_test=False,
        batch_invariant=True,
        kv_pages=100,
        page_size=4,
        max_model_len=80,
        max_running=8,
        max_batch_tokens=40,
        prefill_chunk=16,
        # Two of three adapters fit: they are swapped while steps fail.
        rank_units=3,
        max_slots=2,
        poison=True,
        schedule_ahead="ahead" in request.param,
    )
    engine = RealEngine(config, adapters, record=record_eagerly if "graphs" in request.param else None)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(real: RealEngine) -> list[Outcome]:
    """What the jobs give when nothing goes wrong."""
    outcomes = serve(real, real.requests(JOBS))
    assert {outcome.status for outcome in outcomes} == {"finished"}
    return outcomes


def run(real: RealEngine, rule: Rule, jobs: list[Job] = JOBS) -> tuple[list[Outcome], OutOfMemoryIn]:
    with OutOfMemoryIn(rule).active() as faults:
        outcomes = serve(real, real.requests(jobs))
    assert faults.hits, "the fault was never reached"
    return outcomes, faults


def times(count: int, rule: Rule) -> Rule:
    """The rule, as often as said."""
    left = itertools.repeat(True, count)
    return lambda point, plan: rule(point, plan) and next(left, False)


@pytest.mark.parametrize(("point", "count"), [*((point, 1) for point in POINTS if point != "copies"), ("logits", 6)])
def test_in_a_prefill(real: RealEngine, expected: list[Outcome], point: str, count: int) -> None:
    if point == "replay" and not real.runner.num_graphs:
        point = "forward"
    outcomes, faults = run(real, times(count, lambda where, plan: where == point and bool(prefills(plan))))
    assert outcomes == expected and len(faults.hits) == count


@pytest.mark.parametrize("point", ["copies", "forward", "sample"])
@pytest.mark.parametrize("count", [1, 2])
def test_in_a_step_that_copies_pages(real: RealEngine, expected: list[Outcome], point: str, count: int) -> None:
    if real.runner.num_graphs and point == "forward":
        point = "replay"
    jobs = [job for job in JOBS if dict(job.fields).get("n") == 2]
    alone = [outcome for job, outcome in zip(JOBS, expected, strict=True) if job in jobs]
    outcomes, faults = run(real, times(count, lambda where, plan: where == point and bool(plan.copies)), jobs)
    assert outcomes == alone and len(faults.hits) == count


@pytest.mark.parametrize("point", ["sample", "to host"])
def test_of_the_results_of_more_than_one_row(real: RealEngine, expected: list[Outcome], point: str) -> None:
    outcomes, faults = run(real, lambda where, plan: where == point and len(plan.rows) > 1)
    assert outcomes == expected
    assert sum(sum(row.sample for row in plan.rows) > 1 for _, plan in faults.hits) > 2


@pytest.mark.parametrize("point", ["sample", "to host"])
def test_of_one_result_alone_fails_its_request_only(real: RealEngine, expected: list[Outcome], point: str) -> None:
    victim = next(index for index, job in enumerate(JOBS) if "n" not in dict(job.fields))
    start = list(JOBS[victim].prompt)

    def hits(where: str, plan: StepPlan) -> bool:
        return where == point and any(
            row.sample and row.position >= len(start) + 2 and list(row.history[: len(start)]) == start
            for row in plan.rows
        )

    outcomes, _ = run(real, hits)
    assert outcomes[victim].status == "OUT_OF_MEMORY"
    assert outcomes[victim].tokens[0] == expected[victim].tokens[0][:2]
    assert [*outcomes[:victim], *outcomes[victim + 1 :]] == [*expected[:victim], *expected[victim + 1 :]]


@pytest.mark.parametrize("tokens", [1, 9])
def test_above_a_size(real: RealEngine, expected: list[Outcome], tokens: int) -> None:
    outcomes, _ = run(real, lambda where, plan: where == "forward" and plan.num_tokens > tokens)
    assert outcomes == expected


def test_in_the_step_launched_ahead(real: RealEngine, expected: list[Outcome]) -> None:
    ahead = real.engine._ahead
    nth = itertools.count()

    def fifth(where: str, plan: StepPlan) -> bool:
        return where == "sample" and (plan.behind > 0 or not ahead) and next(nth) % 5 == 4

    outcomes, faults = run(real, fifth)
    assert outcomes == expected and len(faults.hits) > 2
    assert all(plan.behind for _, plan in faults.hits) == ahead


def test_in_sampling_of_more_than_two_rows(real: RealEngine, expected: list[Outcome]) -> None:
    outcomes, _ = run(real, lambda where, plan: where == "sample" and sum(row.sample for row in plan.rows) > 2)
    assert outcomes == expected


def test_of_one_prefill_alone_fails_its_request_only(real: RealEngine, expected: list[Outcome]) -> None:
    victim = 4
    start = list(JOBS[victim].prompt)

    def hits(where: str, plan: StepPlan) -> bool:
        return where == "start" and any(list(row.history[: len(start)]) == start for row in plan.rows)

    outcomes, _ = run(real, hits)
    assert outcomes[victim].status == "OUT_OF_MEMORY" and not outcomes[victim].tokens
    assert [*outcomes[:victim], *outcomes[victim + 1 :]] == [*expected[:victim], *expected[victim + 1 :]]


def test_of_one_decode_row_alone_fails_its_request_and_all_its_choices(
    real: RealEngine, expected: list[Outcome]
) -> None:
    victim = next(index for index, job in enumerate(JOBS) if dict(job.fields).get("n") == 2)
    start = list(JOBS[victim].prompt)

    def hits(where: str, plan: StepPlan) -> bool:
        return where == "sample" and any(
            row.choice == 1 and row.position > len(start) + 2 and list(row.history[: len(start)]) == start
            for row in plan.rows
        )

    outcomes, _ = run(real, hits)
    assert outcomes[victim].status == "OUT_OF_MEMORY" and outcomes[victim].tokens
    for choice, tokens in outcomes[victim].tokens.items():
        assert tokens == expected[victim].tokens[choice][: len(tokens)], "what came out before the end is right"
    assert [*outcomes[:victim], *outcomes[victim + 1 :]] == [*expected[:victim], *expected[victim + 1 :]]


def test_of_everything_fails_everything_and_the_engine_goes_on(real: RealEngine, expected: list[Outcome]) -> None:
    outcomes, _ = run(real, lambda where, plan: where == "start")
    assert {outcome.status for outcome in outcomes} == {"OUT_OF_MEMORY"}
    assert serve(real, real.requests(JOBS)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
        "CUDA error: unspecified launch failure",
    ],
)
def test_other_failures_end_the_engine(real: RealEngine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def broken(plan: StepPlan) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(real.runner, "_launch", broken)
    plan = StepPlan(step=10**6, rows=[])
    with pytest.raises(RuntimeError, match=text[:30]):
        real.runner.launch(plan)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_way_of_saying_out_of_memory(real: RealEngine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(plan: StepPlan) -> None:
        raise error

    monkeypatch.setattr(real.runner, "_launch", broken)
    with pytest.raises(OutOfMemory):
        real.runner.launch(StepPlan(step=10**6, rows=[])).result()
