"""The engine over a real tiny model: batched, chunked, forked, preempted and evicted output equals the solo run."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import Add, Done, PutVersion, SamplingSpec, Stats, Tokens, VersionSpec
from loramux_server.engine.runner import build_runner
from loramux_server.kernels.batch import ForwardBatch
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.serving_blob import BLOB_NAME
from loramux_server.model.slab import LoraSlab
from tests.support.tiny_models import make_adapter, make_checkpoint

RANKS = (8, 16, 24)
Output = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory / "base")
    for seed, rank in enumerate(RANKS):
        make_adapter(directory / f"v{seed}", directory / "base", seed=seed, rank=rank)
    return directory


def make_engine(directory: Path, **settings: object) -> tuple[Engine, Callable[[], None]]:
    fields = {
        "max_model_len": 100,
        "page_size": 4,
        "max_running": 8,
        "max_batch_tokens": 64,
        "prefill_chunk": 16,
        "poison": True,
    }
    config = EngineConfig(
        model=str(directory / "base"),
        weights="fp32",
        device="cpu",
        threads=1,
        self_test=False,
        batch_invariant=True,
        **{**fields, **settings},  # type: ignore[arg-type]
    )
    runner = build_runner(config)
    engine = Engine(config, runner, fingerprint=runner.ready.fingerprint, max_model_len=runner.ready.max_model_len)
    versions = [f"v{number}" for number in range(len(RANKS))]
    engine.handle(
        [PutVersion(spec=VersionSpec(version=v, digest=f"digest-{v}", path=str(directory / v))) for v in versions]
    )
    return engine, runner.close


def run(engine: Engine, requests: list[Add]) -> tuple[Output, list[Done], Stats]:
    output: Output = {}
    ends: list[Done] = []
    engine.handle(requests)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Tokens):
                output.setdefault((event.request_id, event.index), []).extend(event.token_ids)
            elif isinstance(event, Done):
                ends.append(event)
        engine.check_integrity()
        if engine.stalled:
            time.sleep(0.001)
    return output, ends, engine.stats()


def make_requests() -> list[Add]:
    rng = random.Random(1)
    return [
        Add(
            request_id=f"r{number}",
            prompt_token_ids=([5] * 9 if number % 2 else []) + [rng.randrange(500) for _ in range(rng.randint(1, 20))],
            sampling=SamplingSpec(
                max_tokens=rng.randint(3, 20),
                n=rng.choice([1, 1, 2, 3]),
                seed=number,
                temperature=rng.choice([0.0, 1.0]),
                presence_penalty=rng.choice([0.0, 0.5]),
                frequency_penalty=rng.choice([0.0, 0.3]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                bad_words=[[5, 5], [rng.randrange(500), rng.randrange(500)]],
            ),
            version=rng.choice([None, "v0", "v1", "v2"]),
            fairness_key=f"k{number % 3}",
        )
        for number in range(24)
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_crowded_engine_gives_what_each_request_gets_alone(directory: Path, ahead: bool) -> None:
    requests = make_requests()
    engine, close = make_engine(directory, kv_pages=27, rank_units=3, max_slots=3, schedule_ahead=ahead)
    crowded, ends, stats = run(engine, requests)
    close()
    assert {end.status for end in ends} == {"finished"} and len(ends) == len(requests)
    assert stats.preemptions > 0 and stats.adapter_evictions > 0 and stats.prefix_hit_tokens > 0
    engine, close = make_engine(directory, kv_pages=100, prefix_cache=False, poison=False)
    alone: Output = {}
    for request in requests:
        alone.update(run(engine, [request])[0])
    close()
    assert crowded == alone


def test_adapters_that_come_from_host_and_blobs_give_the_same_tokens(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "model")
    requests = [request for request in make_requests() if request.version is not None][:8]
    engine, close = make_engine(directory, kv_pages=100, host_adapter_bytes=0)
    expected, _, stats = run(engine, requests)
    close()
    assert stats.host_bytes_total == 0 and stats.host_misses == stats.adapter_loads == 3
    settings = {"kv_pages": 60, "rank_units": 2, "max_slots": 1, "serving_blobs": True}
    # Room for all, for one, for none.
    for host_bytes in (1 << 22, 200_000, 1000):
        engine, close = make_engine(tmp_path / "model", host_adapter_bytes=host_bytes, **settings)
        assert run(engine, requests)[0] == expected
        again = [msgspec.structs.replace(request, request_id=f"{request.request_id}+") for request in requests]
        output, _, stats = run(engine, again)
        close()
        assert output == {(f"{name}+", index): tokens for (name, index), tokens in expected.items()}
        assert stats.host_hits + stats.host_misses == stats.adapter_loads > 3
        assert stats.host_bytes_used <= host_bytes
        assert host_bytes < 1 << 22 or stats.host_misses <= 3
        assert host_bytes > 1000 or stats.host_hits == 0
    assert all((tmp_path / "model" / f"v{number}" / BLOB_NAME).exists() for number in range(3))
    assert not any((directory / f"v{number}" / BLOB_NAME).exists() for number in range(3)), "not asked for"


def test_too_much_host_memory_is_cut_and_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pages = {"SC_PHYS_PAGES": 1 << 18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    engine, close = make_engine(directory, kv_pages=100, host_adapter_bytes=3 << 29)
    assert engine.stats().host_bytes_total == 1 << 29
    close()
    told = "--host-adapter-gib: 1.50 is over half of this machine's memory; 0.50 GiB are used, ask for no more"
    assert told in [record.getMessage() for record in caplog.records]


def test_steps_that_run_out_of_memory_leave_no_trace(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests()
    engine, close = make_engine(directory, kv_pages=100, rank_units=3, max_slots=3, schedule_ahead=True)
    rng = random.Random(3)
    failures = 0
    forward, logits = CausalLM.forward, CausalLM.logits

    def fail_sometimes(tokens: int) -> None:
        nonlocal failures
        if tokens > 1 and rng.random() < 0.1:
            failures += 1
            raise torch.OutOfMemoryError("injected")

    def failing_forward(self: CausalLM, batch: ForwardBatch, kv: list[Tensor], slab: LoraSlab | None) -> Tensor:
        fail_sometimes(len(batch.token_ids))
        return forward(self, batch, kv, slab)

    def failing_logits(self: CausalLM, hidden: Tensor) -> Tensor:
        # The keys and values of the step are written by now.
        fail_sometimes(len(hidden))
        return logits(self, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", failing_forward)
        patch.setattr(CausalLM, "logits", failing_logits)
        got, ends, _ = run(engine, requests)
    assert failures > 5
    assert {end.status for end in ends} == {"finished"}
    expected: Output = {}
    for request in requests:
        expected.update(run(engine, [msgspec.structs.replace(request, request_id=f"{request.request_id} again")])[0])
    close()
    assert got == {(name.removesuffix(" again"), index): tokens for (name, index), tokens in expected.items()}
