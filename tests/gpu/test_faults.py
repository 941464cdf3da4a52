"""Faults on a real device: memory that runs out, loads that break off, shapes without a kernel."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loramux_server.engine import graphs, scheduler
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.plan import StepPlan
from loramux_server.kernels import attention, capability, lora
from loramux_server.model.slab import UNIT_ROWS, LoraSlab
from tests.support.engine_runs import Job, RealEngine, random_jobs
from tests.support.fault_runs import Outcome, mixed_jobs, serve
from tests.support.tiny_models import make_adapter, make_checkpoint

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MARK = 7
"""A token at the start of the victim's prompt alone; `mixed_jobs` and `random_jobs` begin with others."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("faults")
    base = make_checkpoint(root / "base", "qwen2", hidden=256, intermediate_size=4096, max_position=8192)
    return base, [make_adapter(root / f"a{seed}", base, seed=seed, rank=rank) for seed, rank in enumerate((4, 16, 8))]


def make_config(base: Path, **fields: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model": str(base),
        "weights": "fp32",
        "device": DEVICE,
        "batch_invariant": True,
        "self_test": False,
        "kv_pages": 1200,
        "max_running": 16,
        "max_batch_tokens": 128,
        "prefill_chunk": 64,
        "max_model_len": 512,
        "rank_units": 4,
        "max_slots": 3,
        "poison": True,
        **fields,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


@contextlib.contextmanager
def engine(config: EngineConfig, adapters: Sequence[Path]) -> Iterator[RealEngine]:
    real = RealEngine(config, adapters)
    try:
        yield real
    finally:
        real.close()


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Let this process take only so many bytes more from the device than it holds, until the block ends."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Take every byte that PyTorch's allocator could still give out, until the block ends."""
    hogs: list[Tensor] = []
    with room(0):
        size = 1 << 26
        while size >= 512:
            try:
                hogs.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            yield
        finally:
            hogs.clear()


def ran_out(caplog: pytest.LogCaptureFixture) -> bool:
    return any(
        record.name == scheduler.__name__ and "out of memory in a step" in record.getMessage()
        for record in caplog.records
    )


def assert_memory_is_free_again() -> None:
    torch.cuda.empty_cache()
    assert torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).numel()


def test_prefills_that_do_not_fit_are_halved_until_they_do(
    files: tuple[Path, list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    base, adapters = files
    # A chunk of 4,096 tokens takes 128 MiB for the output of gate and up alone, one of 512 takes 16.
    config = make_config(
        base, cuda_graphs=False, max_model_len=4200, max_batch_tokens=4096, prefill_chunk=4096, prefix_cache=False
    )
    jobs = random_jobs(8, adapters=len(adapters), vocab=512, seed=1)
    jobs += [dataclasses.replace(job, prompt=job.prompt * (4000 // len(job.prompt))) for job in jobs[:3]]
    with engine(config, adapters) as real:
        expected = serve(real, real.requests(jobs))
        assert not ran_out(caplog)
        with room(64 << 20):
            outcomes = serve(real, real.requests(jobs))
        assert ran_out(caplog), "the device had room for everything"
        assert outcomes == expected
        assert_memory_is_free_again()
        assert serve(real, real.requests(jobs)) == expected
    assert {outcome.status for outcome in expected} == {"finished"}


@pytest.mark.parametrize("point", ["prefill", "output"])
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_what_does_not_fit_even_alone_fails_alone(
    files: tuple[Path, list[Path]], cuda_graphs: bool, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = files
    jobs = [job for job in mixed_jobs(14, adapters=len(adapters), vocab=512, seed=2) if job.prompt[0] != MARK]
    victim = Job(prompt=(MARK, *range(100, 180)), adapter=0)
    jobs.insert(5, victim)
    launch = ModelRunner._launch
    hits = 0

    def starved(runner: ModelRunner, plan: StepPlan) -> Any:
        nonlocal hits
        late = len(victim.prompt) + 3 if point == "output" else 0
        if not any(row.history[0] == MARK and row.position > late for row in plan.rows):
            return launch(runner, plan)
        hits += 1
        with nothing_left():
            return launch(runner, plan)

    with engine(make_config(base, cuda_graphs=cuda_graphs), adapters) as real:
        assert bool(real.runner.num_graphs) == cuda_graphs
        expected = serve(real, real.requests(jobs))
        assert {outcome.status for outcome in expected} == {"finished"}
        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "_launch", starved)
            outcomes = serve(real, real.requests(jobs))
        assert hits > 1
        failed = outcomes.pop(5)
        assert failed.status == "OUT_OF_MEMORY"
        tokens = failed.tokens.get(0, [])
        assert tokens == expected[5].tokens[0][: len(tokens)] and bool(tokens) == (point == "output")
        assert outcomes == [*expected[:5], *expected[6:]]
        assert_memory_is_free_again()
        assert serve(real, real.requests(jobs)) == expected


def test_a_load_that_breaks_off_fails_its_requests_only(
    files: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = files
    jobs = random_jobs(12, adapters=2, vocab=512, seed=3, longest=40)
    victims = [dataclasses.replace(job, adapter=2) for job in jobs[:3]]
    fill = LoraSlab.fill

    def breaking_off(slab: LoraSlab, slot: int, first_unit: int, units: int, rows: Any) -> None:
        if rows.layout.rows != 8:  # the rank of the third adapter alone
            return fill(slab, slot, first_unit, units, rows)
        # Some of it is there, and wrong.
        begin = first_unit * UNIT_ROWS
        slab.group(0, "qkv").a[:, begin : begin + units * UNIT_ROWS].fill_(float("nan"))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with engine(make_config(base), adapters) as real:
        with monkeypatch.context() as patch:
            patch.setattr(LoraSlab, "fill", breaking_off)
            outcomes = serve(real, real.requests([*jobs[:6], *victims, *jobs[6:]]))
        failed = outcomes[6:9]
        assert not {outcome.status for outcome in failed} & {"finished", ""}
        assert not any(outcome.tokens for outcome in failed)
        served = outcomes[:6] + outcomes[9:]
        assert {outcome.status for outcome in served} == {"finished"}
        assert serve(real, real.requests(jobs)) == served
        # The next request loads it again, into the rows that were left in that state.
        assert {outcome.status for outcome in serve(real, real.requests(victims))} == {"finished"}


def warnings_of(caplog: pytest.LogCaptureFixture, *modules: Any) -> list[str]:
    names = {module.__name__ for module in modules}
    return [record.getMessage() for record in caplog.records if record.name in names]


def tokens_on(device: str, base: Path, adapters: Sequence[Path], jobs: Sequence[Job]) -> list[Outcome]:
    with engine(make_config(base, device=device, threads=1), adapters) as real:
        return serve(real, real.requests(jobs))


@pytest.mark.parametrize("lacking", ["attention", "lora"])
def test_a_shape_without_a_kernel_is_served_in_torch(
    lacking: str,
    files: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, adapters = files
    # Greedy: a draw may fall on another token for a difference in the last bit.
    jobs = random_jobs(12, adapters=len(adapters), vocab=512, seed=8, longest=60)
    jobs = [dataclasses.replace(job, fields=()) for job in jobs]
    if lacking == "attention":
        assert attention.unsupported(torch.float32, heads=2, kv_heads=1, head_dim=320)
        base = make_checkpoint(tmp_path / "wide", "llama", hidden=128, heads=2, kv_heads=1, head_dim=320)
        adapters = [make_adapter(tmp_path / f"w{seed}", base, seed=seed, rank=8) for seed in range(len(adapters))]
        operation, cause, kept = "paged_attention", "head dimension 320 is over 256", "any step"
    else:
        operation, cause, kept = "lora_add", "3 slices are more than 2", "steps with adapters"
    expected = tokens_on("cpu", base, adapters, jobs)
    if lacking == "lora":
        monkeypatch.setattr(lora, "MAX_SLICES", 2)
    capability._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING), engine(make_config(base), adapters) as real:
        assert (real.runner.num_graphs > 0) == (lacking == "lora")
        assert serve(real, real.requests(jobs)) == expected
        assert serve(real, real.requests([job for job in jobs if job.adapter is None]))
        assert (real.runner.replays > 0) == (lacking == "lora"), "the base alone is replayed"
    (fallback,) = warnings_of(caplog, capability)
    assert fallback == f"{operation} runs in its torch form, several times slower: {cause}"
    (eager,) = warnings_of(caplog, graphs)
    assert f"no CUDA graph of {kept}" in eager and operation in eager and cause in eager
