"""Servers on a real engine for the `test_real_*` modules; a server is started for the first test that asks for it.

Torch and the model builders are imported inside the fixtures: tests on a scripted engine do not pay for them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.otlp_collector import Collector
from tests.e2e.real_server import RealServer, publish, real_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base."""
    from tests.support.tiny_models import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("base") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """PEFT directories by name; `v1` and `v2` are two versions of one adapter, the others differ in every respect."""
    from tests.support.tiny_models import make_adapter

    root = tmp_path_factory.mktemp("adapters")
    return {
        "v1": make_adapter(root / "v1", checkpoint, rank=8, seed=1),
        "v2": make_adapter(root / "v2", checkpoint, rank=8, seed=2),
        "attention": make_adapter(root / "r4", checkpoint, rank=4, seed=3, target_modules=["q_proj", "v_proj"]),
        "rslora": make_adapter(root / "r16", checkpoint, rank=16, alpha=8, seed=4, use_rslora=True),
        "pattern": make_adapter(
            root / "pattern",
            checkpoint,
            rank=8,
            seed=5,
            target_modules=["k_proj", "o_proj", "down_proj", "gate_proj"],
            rank_pattern={"layers.0.self_attn.o_proj": 4, "down_proj": 16},
            alpha_pattern={"gate_proj": 4},
        ),
    }


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """An OTLP collector that keeps what it gets."""
    with Collector() as running:
        yield running


@pytest.fixture(scope="session")
def server(
    checkpoint: Path, adapters: Mapping[str, Path], collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """The server that most tests share: room for 128 sequences, the prefix cache on, spans to the collector."""
    with real_server(
        checkpoint,
        tmp_path_factory.mktemp("shared") / "store",
        "--kv-pages",
        "768",
        "--otlp-endpoint",
        collector.endpoint,
        "--log-level",
        "debug",
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as running:
        publish(running, adapters, *adapters)
        yield running


@pytest.fixture(scope="session")
def fresh_server(
    checkpoint: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """Another process without the prefix cache: what it answers owes nothing to earlier requests."""
    with real_server(
        checkpoint, tmp_path_factory.mktemp("fresh") / "store", "--kv-pages", "256", "--no-prefix-cache"
    ) as running:
        publish(running, adapters, *adapters)
        yield running
