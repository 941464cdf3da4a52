"""Captured graphs give what eager launches give, for any mix of rows, adapters and slots."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.plan import StepHandle, StepPlan
from tests.support.engine_runs import RealEngine, random_jobs
from tests.support.tiny_models import make_adapter, make_checkpoint

pytestmark = pytest.mark.gpu
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("graphs")
    base = make_checkpoint(root / "base", "qwen2", hidden=256, layers=3, dtype="bfloat16")
    adapters = [
        make_adapter(
            root / f"a{index}",
            base,
            rank=(4, 8, 16, 5)[index % 4],
            alpha=32,
            seed=index,
            target_modules=TARGETS if index % 2 else TARGETS[:3],
        )
        for index in range(6)
    ]
    return base, adapters


def make_config(base: Path, **fields: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model": str(base),
        "weights": "nf4",
        "device": "cuda",
        "batch_invariant": True,
        "kv_pages": 600,
        "max_running": 16,
        "max_batch_tokens": 256,
        "prefill_chunk": 64,
        "max_model_len": 512,
        # Fewer slots than adapters: they are swapped between replays.
        "rank_units": 3,
        "max_slots": 3,
        "poison": True,
        **fields,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


def test_graphs_give_the_tokens_of_eager_steps(files: tuple[Path, list[Path]]) -> None:
    base, adapters = files
    jobs = random_jobs(60, adapters=len(adapters), vocab=512, seed=3)
    graphs = RealEngine(make_config(base), adapters)
    assert graphs.runner.num_graphs > 0
    replayed = graphs.run(jobs)
    again = graphs.run(list(reversed(jobs)))[::-1]
    assert graphs.runner.replays > 0
    graphs.close()
    settings = make_config(base, cuda_graphs=False, schedule_ahead=False, rank_units=16, max_slots=16)
    eager = RealEngine(settings, adapters)
    expected = eager.run(jobs)
    alone = [eager.run([job])[0] for job in jobs[:8]]
    eager.close()
    assert replayed == expected
    assert again == expected, "the order of arrival changed tokens"
    assert alone == expected[:8], "company changed tokens"


def test_without_batch_invariance_steps_still_finish_and_mix(files: tuple[Path, list[Path]]) -> None:
    base, adapters = files
    engine = RealEngine(make_config(base, batch_invariant=False), adapters)
    outputs = engine.run(random_jobs(40, adapters=len(adapters), vocab=512, seed=4))
    engine.close()
    assert all(len(output) == 12 for output in outputs)


def test_a_step_with_fewer_tokens_than_sequences_may_run(files: tuple[Path, list[Path]]) -> None:
    base, adapters = files
    jobs = random_jobs(12, adapters=len(adapters), vocab=512, seed=5)
    outputs = []
    for graphs in (True, False):
        engine = RealEngine(make_config(base, max_running=16, max_batch_tokens=8, cuda_graphs=graphs), adapters)
        outputs.append(engine.run(jobs))
        assert (engine.runner.replays > 0) == graphs
        engine.close()
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_launch_never_waits_for_the_device(
    files: tuple[Path, list[Path]], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = files
    # Room for every adapter: a load waits for its own copies, in a thread of its own, but the mode is the process'.
    config = make_config(base, cuda_graphs=graphs, poison=False, rank_units=16, max_slots=16)
    engine = RealEngine(config, adapters)
    jobs = random_jobs(24, adapters=len(adapters), vocab=512, seed=6)
    everything = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "logprobs": 3, "presence_penalty": 0.5}
    jobs += [dataclasses.replace(job, fields=tuple(everything.items())) for job in jobs[:8]]
    jobs += [dataclasses.replace(job, fields=(("prompt_logprobs", 2),)) for job in jobs[8:12]]
    expected = engine.run(jobs)
    launch = engine.runner.launch

    with warnings.catch_warnings():  # torch says once that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("default")

    def watched(plan: StepPlan) -> StepHandle:
        try:
            torch.cuda.set_sync_debug_mode("error")
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.runner, "launch", watched)
    again = engine.run(jobs)
    engine.close()
    assert again == expected
