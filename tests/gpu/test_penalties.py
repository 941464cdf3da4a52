"""Penalties and bans on CUDA: the bits of the CPU, and no wait for the device, late tokens or not."""

import dataclasses
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.penalties import Penalties
from loramux_server.engine.plan import RowPlan, StepHandle, StepPlan
from tests.support.engine_runs import Job, RealEngine, random_jobs
from tests.support.penalty_cases import CPU, make_row, make_spec
from tests.support.tiny_models import make_checkpoint

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():  # torch says once that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("vocab", [50, 152064])
def test_the_device_gives_the_bits_of_the_cpu(vocab: int, late: bool) -> None:
    rng = random.Random(vocab)
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(32, vocab, generator=generator)
    sampled = torch.randint(min(vocab, 40), (32, 2), generator=generator).to(torch.int32)[:, 0]
    rows: list[RowPlan] = []
    for index in range(32):
        # Few different tokens, so that late ones are among those seen and bad words are met.
        history = [rng.randrange(40) for _ in range(rng.randint(2, 400))]
        spec = make_spec(
            repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
            presence_penalty=rng.choice([0.0, 0.37]),
            frequency_penalty=rng.choice([0.0, 0.11]),
            logit_bias=rng.choice([{}, {3: 1.7, 31: -2.9}]),
            bad_words=rng.choice([[], [[history[-1], token, token % 5] for token in range(40)] + [[7, 8], [9]]]),
            min_tokens=rng.choice([0, 1000]),
            eos_token_ids=[11],
        )
        source = rng.randrange(32) if late and index % 3 else -1
        rows.append(make_row(spec, history=history, prompt=len(history) // 2, source=source, sequence_id=index))
    expected = Penalties(vocab_size=vocab, device=CPU).adjust(logits, rows, sampled)
    there, tokens = logits.to(CUDA), sampled.to(CUDA)
    penalties = Penalties(vocab_size=vocab, device=CUDA)
    penalties.adjust(there, rows, tokens)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        adjusted = penalties.adjust(there, rows, tokens)
    assert torch.equal(adjusted.cpu(), expected)
    assert torch.equal(there.cpu(), logits), "raw logits stay raw"


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
        "rank_units": 3,
        "max_slots": 3,
        **fields,
    }
    return EngineConfig(**settings)  # type: ignore[arg-type]


def penalised(jobs: list[Job], outputs: list[list[int]]) -> list[Job]:
    """The jobs under penalties, and with words banned that they gave without."""
    rng = random.Random(9)
    changed: list[Job] = []
    for number, (job, output) in enumerate(zip(jobs, outputs, strict=True)):
        words = [output[start : start + length] for length in (2, 3) for start in range(0, len(output) - length, 2)]
        fields = {
            **dict(job.fields),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "presence_penalty": rng.choice([0.0, 0.6]),
            "frequency_penalty": rng.choice([0.0, 0.4]),
            "logit_bias": rng.choice([{}, {output[0]: 1.0}]),
            "bad_words": words if number % 3 else [],
            "logprobs": rng.choice([None, 2]),
        }
        changed.append(dataclasses.replace(job, fields=tuple(fields.items())))
    return changed


def test_steps_ahead_neither_wait_nor_change_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", hidden=256, layers=2, dtype="bfloat16")
    plain = [
        dataclasses.replace(job, fields=(*job.fields, ("max_tokens", 24)))
        for job in random_jobs(24, adapters=0, vocab=512, seed=8)
    ]
    sequential = RealEngine(make_config(base, cuda_graphs=False, schedule_ahead=False))
    without = sequential.run(plain)
    jobs = penalised(plain, without)
    expected = sequential.run(jobs)
    sequential.close()
    assert sum(one != other for one, other in zip(expected, without, strict=True)) > 12, "nothing was penalised"
    for graphs in (True, False):
        engine = RealEngine(make_config(base, cuda_graphs=graphs))
        assert engine.run(jobs) == expected
        launch = engine.runner.launch
        late = 0

        def watched(plan: StepPlan, launch: object = launch) -> StepHandle:
            nonlocal late
            late += sum(row.source >= 0 for row in plan.rows)
            with waiting_is_an_error():
                return launch(plan)  # type: ignore[operator]

        monkeypatch.setattr(engine.runner, "launch", watched)
        again = engine.run(jobs)
        engine.close()
        assert again == expected
        # All but the first token of each; a step that found no page free may have waited for one.
        assert late > 0.9 * sum(len(output) - 1 for output in expected)
