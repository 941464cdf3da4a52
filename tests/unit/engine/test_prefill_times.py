"""Which prefill chunk is chosen, how it is timed, and that the engine follows it."""

from pathlib import Path

import msgspec
import pytest
import torch

from loramux_base.checkpoint import read_json
from loramux_server import tune_command
from loramux_server.config import ConfigError
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.limits import DEFAULT_PREFILL_CHUNK
from loramux_server.engine.plan import OutOfMemory, StepPlan, StepResult
from loramux_server.engine.prefill_times import ChunkTime, best_chunk, chunk_ladder, time_chunks
from loramux_server.model.linear import TuningTable
from loramux_server.model.spec import ModelSpec
from loramux_server.tune_command import chunk_report, prefill_times
from tests.support.fake_runner import FakeRunner
from tests.support.tiny_models import make_checkpoint


def chunk(tokens: int, *, rate: float) -> ChunkTime:
    return ChunkTime(tokens=tokens, step_s=tokens / rate)


class TestBestChunk:
    def test_the_smallest_within_three_percent_of_the_best(self) -> None:
        times = [chunk(128, rate=20_000), chunk(256, rate=96_900), chunk(512, rate=97_100), chunk(2048, rate=100_000)]
        assert best_chunk(times) == 512

    def test_a_chunk_that_makes_decoding_wait_too_long_is_no_choice(self) -> None:
        slow = [chunk(512, rate=9_000), chunk(1024, rate=16_000), chunk(2048, rate=30_000)]
        assert slow[0].step_s < 0.060 < slow[1].step_s
        assert best_chunk(slow) == 512

    def test_where_all_are_too_slow_the_smallest_is_taken(self) -> None:
        assert best_chunk([chunk(256, rate=2_000), chunk(128, rate=1_000)]) == 128


def test_the_ladder_ends_where_the_model_does() -> None:
    assert chunk_ladder(2047) == [128, 256, 512, 1024]
    assert chunk_ladder(10**6)[-1] == 2048
    assert chunk_ladder(100) == []


class _Handle:
    def result(self) -> StepResult:
        return StepResult(rows=[])


class _Recording:
    page_size = 16

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan) -> _Handle:
        self.plans.append(plan)
        return _Handle()

    def release_sequence(self, sequence_id: int) -> None:
        pass


def test_every_size_is_timed_over_the_same_prompt() -> None:
    runner = _Recording()
    times = time_chunks(runner, [128, 512])  # type: ignore[arg-type]
    assert [one.tokens for one in times] == [128, 512] and all(one.step_s > 0 for one in times)
    spans = [(row.start, row.start + len(row.token_ids), row.sample) for plan in runner.plans for row in plan.rows]
    assert spans[:4] == [(0, 128, False), (128, 256, False), (256, 384, False), (384, 512, True)]
    assert spans[-1] == (0, 512, True)
    assert all(len(row.pages) * 16 == row.position and 0 not in row.pages for p in runner.plans for row in p.rows)


def test_a_real_runner_is_timed(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "m", max_position=300)
    spec = ModelSpec.from_config(read_json(base / "config.json"))
    times = prefill_times(base, spec, TuningTable(), device="cpu")
    assert [one.tokens for one in times] == [128, 256]
    lines = chunk_report(times)
    assert len(lines) == 2 and sum("-> chosen" in line for line in lines) == 1 and "tokens/s" in lines[0]


@pytest.mark.parametrize("where", ["build_runner", "time_chunks"])
def test_a_base_that_the_device_has_no_room_for_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    base = make_checkpoint(tmp_path / "m", max_position=300)
    spec = ModelSpec.from_config(read_json(base / "config.json"))
    errors: list[Exception] = [torch.OutOfMemoryError("CUDA out of memory")]

    def fail(*arguments: object, **options: object) -> object:
        raise errors[-1] if where == "build_runner" else OutOfMemory("step of 256 tokens")

    monkeypatch.setattr(tune_command, where, fail)
    with pytest.raises(ConfigError, match=r"--model .*: the device ran out of memory .*; end what else uses"):
        prefill_times(base, spec, TuningTable(), device="cpu")
    errors.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    if where == "build_runner":
        with pytest.raises(RuntimeError, match="illegal memory access"):
            prefill_times(base, spec, TuningTable(), device="cpu")


def test_a_model_of_short_sequences_has_nothing_to_choose(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "m", max_position=64)
    spec = ModelSpec.from_config(read_json(base / "config.json"))
    assert prefill_times(base, spec, TuningTable(), device="cpu") == []
    assert "not measured" in chunk_report([])[0]


@pytest.mark.parametrize(
    ("setting", "tuned", "budget", "chunk"),
    [
        (None, None, 2048, DEFAULT_PREFILL_CHUNK),
        (None, "1024", 2048, 1024),
        (None, "1024", 600, 600),
        (256, "1024", 2048, 256),
        (256, None, 100, 100),
    ],
)
def test_the_engine_takes_the_setting_else_what_was_measured(
    setting: int | None, tuned: str | None, budget: int, chunk: int
) -> None:
    config = EngineConfig(model="", prefill_chunk=setting, max_batch_tokens=budget, max_running=8)
    runner = FakeRunner()
    details = {} if tuned is None else {"tuned_prefill_chunk": tuned}
    ready = msgspec.structs.replace(runner.ready, details=details)
    assert Engine.serving(config, runner, ready).limits.prefill_chunk == chunk


def test_a_chunk_of_nothing_is_refused() -> None:
    config = EngineConfig(model="", prefill_chunk=0)
    with pytest.raises(ValueError, match="prefill_chunk: 0 must be at least 1"):
        Engine(config, FakeRunner())
