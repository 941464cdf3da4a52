import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loramux_server.model.quantize import quantize_checkpoint
from loramux_trainer.config import RunConfig
from loramux_trainer.run import Result, train
from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "tiny", "qwen2")


@pytest.fixture(scope="session")
def base(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_checkpoint(dense, tmp_path_factory.mktemp("nf4") / "tiny-nf4")


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("other")
    return quantize_checkpoint(make_checkpoint(root / "dense", "qwen2", seed=1), root / "tiny-nf4")


def records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "system": "Be brief.",
            "dialogue": [
                {"user": f"Where is order {index}?", "assistant": f"Order {index} is on its way."},
                {"user": "And the invoice?", "assistant": "It comes by mail."},
            ][: 1 + index % 2],
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def small_run(base: Path, directory: Path, output: str = "run", **train: Any) -> RunConfig:
    """A small run: 22 of 24 conversations, 6 steps an epoch; keyword arguments replace settings of `train`."""
    data = write_jsonl(directory / "data.jsonl", records(24))
    return RunConfig.model_validate(
        {
            "base": base,
            "output": directory / output,
            "seed": 7,
            "device": "cpu",
            "data": {"train": [data], "max_length": 128},
            "lora": {"r": 8, "alpha": 16, "dropout": 0.1},
            "train": {"epochs": 2.0, "batch_size": 2, "accumulation": 2, "learning_rate": 5e-3, **train},
        }
    )


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return functools.partial(small_run, base, tmp_path)


@pytest.fixture(scope="session")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that tests look at and compare with."""
    config = small_run(base, tmp_path_factory.mktemp("finished"), log_steps=1, eval_steps=6)
    return train(config, console=Console(quiet=True))
