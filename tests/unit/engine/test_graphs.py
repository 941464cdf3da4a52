"""Replayed forward passes over static batches give what eager ones give; graphs are stood in for by eager launches."""

import contextlib
import dataclasses
import logging
import random
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from loramux_base.adapter import base_shapes
from loramux_base.checkpoint import read_json
from loramux_server.engine import graphs
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.graphs import ForwardGraphs
from loramux_server.engine.memory import allocate_kv
from loramux_server.engine.plan import StepPlan
from loramux_server.engine.staging import BatchStaging
from loramux_server.engine.static_batch import BatchShape, StaticBatch
from loramux_server.kernels import attention, lora
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.load import load_model
from loramux_server.model.slab import LoraSlab
from tests.support.engine_runs import RealEngine, random_jobs, record_eagerly
from tests.support.random_plans import random_plan
from tests.support.tiny_models import make_adapter, make_checkpoint

PAGE = 4
ROWS = 6
TOKENS = 32
LENGTH = 24
SLOTS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("graphs")
    base = make_checkpoint(root / "base")
    targets = (["q_proj", "v_proj"], ["o_proj", "gate_proj", "down_proj"], ["k_proj"], ["up_proj", "q_proj"])
    return base, [
        make_adapter(root / f"a{seed}", base, seed=seed, rank=rank, target_modules=targets[seed])
        for seed, rank in enumerate((4, 16, 20, 8))
    ]


class Twins:
    """One model with two caches of equal contents: one for replayed steps, one for eager ones."""

    def __init__(self, files: tuple[Path, list[Path]]) -> None:
        base, adapters = files
        self.model: CausalLM = load_model(base, weights="fp32", device=CPU, batch_invariant=True)
        shapes = base_shapes(read_json(base / "config.json"))
        self.slab = LoraSlab(
            shapes, rank_units=4, max_slots=SLOTS, max_rank=32, dtype=torch.float32, device=CPU, poison=True
        )
        for slot, first_unit, units in ((0, 0, 1), (1, 1, 1), (2, 2, 2)):
            self.slab.load(slot, first_unit, units, adapters[slot])
        spec = self.model.spec
        pages = ROWS * LENGTH // PAGE
        generator = torch.Generator().manual_seed(5)
        self.eager = allocate_kv(spec, pages=pages, page_size=PAGE, dtype=torch.float32, device=CPU)
        for layer in self.eager:
            layer.copy_(torch.randn(layer.shape, generator=generator))
        self.replayed = [layer.clone() for layer in self.eager]
        for layer in self.replayed:
            # Padding may read and write the trash page, and none of it may reach a row of the plan.
            layer[0] = float("nan")
        self.staging = BatchStaging(
            device=CPU, max_tokens=TOKENS, max_sequences=ROWS, max_pages=LENGTH // PAGE, page_size=PAGE
        )
        self.graphs = ForwardGraphs(
            self.model,
            kv=self.replayed,
            slab=self.slab,
            static=StaticBatch(
                device=CPU,
                max_tokens=TOKENS,
                max_sequences=ROWS,
                max_pages=LENGTH // PAGE,
                max_segments=SLOTS + 1,
                page_size=PAGE,
            ),
            max_tokens=TOKENS,
            max_sequences=ROWS,
            max_model_len=LENGTH,
            batch_invariant=True,
            record=record_eagerly,
        )
        self.graphs.capture()

    @torch.inference_mode()
    def run_eager(self, plan: StepPlan) -> Tensor:
        batch = self.staging.build(plan)
        return self.model.logits(self.model.forward(batch, self.eager, self.slab if batch.lora is not None else None))


def make_plan(generator: random.Random, vocab: int, *, decode: bool, max_rows: int = ROWS) -> StepPlan:
    return random_plan(
        generator,
        max_rows=max_rows,
        max_tokens=max_rows if decode else TOKENS,
        page_size=PAGE,
        max_length=LENGTH,
        slots=SLOTS,
        vocab=vocab,
        decode=decode,
    )


@pytest.fixture(scope="module")
def twins(files: tuple[Path, list[Path]]) -> Twins:
    return Twins(files)


@pytest.mark.parametrize("seed", range(4))
def test_logits_and_cache_equal_those_of_eager_steps(twins: Twins, seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(16):
        plan = make_plan(
            generator, twins.model.spec.vocab_size, decode=generator.random() < 0.6, max_rows=generator.randint(1, ROWS)
        )
        with torch.inference_mode():
            logits = twins.graphs.run(plan)
        assert logits is not None and len(logits) == sum(row.sample for row in plan.rows)
        assert torch.equal(logits, twins.run_eager(plan)), f"{len(plan.rows)} rows, {plan.num_tokens} tokens"
        for mine, theirs in zip(twins.replayed, twins.eager, strict=True):
            assert torch.equal(mine[1:], theirs[1:]), "a padding token wrote to a page of the pool"


def test_slots_may_be_swapped_between_replays(files: tuple[Path, list[Path]]) -> None:
    twins = Twins(files)
    generator = random.Random(3)
    for adapter, units in ((files[1][3], 1), (files[1][2], 2)):
        twins.slab.clear(2)
        twins.slab.load(2, 2, units, adapter)
        for _ in range(6):
            plan = make_plan(generator, twins.model.spec.vocab_size, decode=generator.random() < 0.5)
            with torch.inference_mode():
                logits = twins.graphs.run(plan)
            assert logits is not None
            assert torch.equal(logits, twins.run_eager(plan))


def test_a_step_takes_the_smallest_rung_that_holds_it(twins: Twins) -> None:
    generator = random.Random(0)
    for _ in range(100):
        plan = make_plan(generator, 9, decode=generator.random() < 0.5)
        shape = twins.graphs.shape_of(plan)
        assert shape is not None
        assert shape.tokens >= plan.num_tokens and shape.max_kv_length >= max(row.position for row in plan.rows)
        assert shape.lora == any(row.slot >= 0 for row in plan.rows)
        if shape.decode:
            assert shape.tokens == min(rung for rung in (1, 2, 4, 6) if rung >= plan.num_tokens)


@pytest.mark.parametrize("short", ["tokens", "sequences", "segments"])
def test_a_replay_never_holds_more_than_was_captured(short: str) -> None:
    plans = (make_plan(random.Random(seed), 9, decode=False) for seed in range(100))
    plan = next(plan for plan in plans if len(plan.rows) > 3 and len({row.slot for row in plan.rows}) > 2)
    room = {"tokens": plan.num_tokens, "sequences": len(plan.rows), "segments": len({row.slot for row in plan.rows})}
    for missing in (0, 1):
        held = {**room, short: room[short] - missing}
        static = StaticBatch(
            device=CPU,
            max_tokens=TOKENS,
            max_sequences=held["sequences"],
            max_pages=LENGTH // PAGE,
            max_segments=held["segments"],
            page_size=PAGE,
        )
        shape = BatchShape(tokens=held["tokens"], decode=False, lora=True, max_kv_length=LENGTH)
        with pytest.raises(AssertionError, match="captured") if missing else contextlib.nullcontext():
            static.fill(plan, shape)


@pytest.mark.parametrize(("max_batch_tokens", "ahead"), [(64, False), (64, True), (6, False), (6, True)])
def test_an_engine_with_graphs_gives_the_tokens_of_one_without(
    files: tuple[Path, list[Path]], max_batch_tokens: int, ahead: bool
) -> None:
    base, adapters = files
    config = EngineConfig(
        model=str(base),
        weights="fp32",
        device="cpu",
        threads=1,
        self_test=False,
        batch_invariant=True,
        kv_pages=60,
        page_size=PAGE,
        max_model_len=60,
        # With 6 tokens a step, more sequences may run than a step has tokens for.
        max_running=8,
        max_batch_tokens=max_batch_tokens,
        prefill_chunk=16,
        rank_units=3,
        max_slots=2,
        poison=True,
    )
    jobs = random_jobs(16, adapters=len(adapters), vocab=96, seed=4, longest=40)
    outputs = []
    for record in (record_eagerly, None):
        settings = msgspec.structs.replace(config, schedule_ahead=ahead and record is not None)
        engine = RealEngine(settings, adapters, record=record)
        outputs.append(engine.run(jobs))
        steps = engine.engine.stats().steps
        assert engine.runner.replays >= steps if record is not None else engine.runner.replays == 0
        engine.close()
    assert outputs[0] == outputs[1]
    assert all(outputs[0])


@pytest.mark.parametrize("lacking", ["attention", "lora"])
def test_steps_of_a_shape_without_a_kernel_stay_eager(
    files: tuple[Path, list[Path]], lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapters = files
    config = EngineConfig(
        model=str(base),
        weights="fp32",
        device="cpu",
        threads=1,
        self_test=False,
        batch_invariant=True,
        kv_pages=60,
        page_size=PAGE,
        max_model_len=60,
        max_running=8,
        max_batch_tokens=64,
    )
    jobs = random_jobs(8, adapters=len(adapters), vocab=96, seed=6, longest=20)
    jobs += [dataclasses.replace(job, adapter=None) for job in jobs]
    everything = RealEngine(config, adapters, record=record_eagerly)
    expected = everything.run(jobs)
    everything.close()
    # As on a card: there the torch form would be taken while a graph is captured.
    monkeypatch.setattr(graphs, "capture_obstacle", lambda _, name, cause: cause and f"{name}: {cause}")
    if lacking == "attention":
        monkeypatch.setattr(attention, "_MAX_HEAD_DIM", 8)
    else:
        monkeypatch.setattr(lora, "MAX_SLICES", 2)
    with caplog.at_level(logging.WARNING, graphs.__name__):
        engine = RealEngine(config, adapters, record=record_eagerly)
    (line,) = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    if lacking == "attention":
        assert "of any step" in line and "paged_attention: head dimension 16 is over 8" in line
        assert engine.runner.num_graphs == 0
    else:
        assert "of steps with adapters" in line and "lora_add: 3 slices are more than 2" in line
        assert engine.runner.num_graphs == everything.runner.num_graphs / 2
    assert engine.run(jobs) == expected
    steps = engine.engine.stats().steps
    replays = engine.runner.replays
    assert replays == 0 if lacking == "attention" else 0 < replays < steps
    assert engine.run([job for job in jobs if job.adapter is None])
    assert (engine.runner.replays > replays) == (lacking == "lora")
    engine.close()
