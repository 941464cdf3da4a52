import errno
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from loramux_trainer.config import RunConfig
from loramux_trainer.errors import ConfigError, Interrupted
from loramux_trainer.progress import ProgressCallback
from loramux_trainer.run import Result, train

Settings = Callable[..., RunConfig]
QUIET = Console(quiet=True)


def _files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class _StopsAfter(ProgressCallback):
    """As if a signal came during a step."""

    number = signal.SIGTERM
    times = 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == 5:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().on_step_end(args, state, control, **kwargs)


def test_a_stopped_run_resumes_to_the_same_bytes(
    finished: Result, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("stopped", log_steps=1, eval_steps=6)
    with monkeypatch.context() as patch:
        patch.setattr("loramux_trainer.run.ProgressCallback", _StopsAfter)
        with pytest.raises(Interrupted, match="after step 5 of 12"):
            train(config, console=QUIET)
    assert not (config.output / "adapter").exists()
    with pytest.raises(ConfigError, match="not empty"):
        train(config, console=QUIET)
    with pytest.raises(ConfigError, match="differs in config_sha256"):
        train(settings("stopped", log_steps=1, learning_rate=1e-3), resume=True, console=QUIET)
    resumed = train(config, resume=True, console=QUIET)
    assert _files(resumed.adapter) == _files(finished.adapter)
    losses = [[line["loss"] for line in _metrics(run.adapter.parent) if "loss" in line] for run in (resumed, finished)]
    assert losses[0] == losses[1]
    with pytest.raises(ConfigError, match="finished run"):
        train(config, resume=True, console=QUIET)


def test_ctrl_c_saves_as_sigterm_does_and_a_second_one_stops_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_trainer.run.ProgressCallback", _StopsAfter)
    monkeypatch.setattr(_StopsAfter, "number", signal.SIGINT)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        train(settings("once"), console=QUIET)
    assert caught.value.exit_code == 130
    monkeypatch.setattr(_StopsAfter, "times", 2)
    with pytest.raises(KeyboardInterrupt):
        train(settings("twice"), console=QUIET)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    written = [sorted(path.name for path in settings(name).output.glob("checkpoints/*")) for name in ("once", "twice")]
    assert written == [["checkpoint-5"], []]


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as a process of a terminal has it, however this test run was started."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class _ClosedTerminal(io.StringIO):
    """Standard error of a process whose terminal has closed, as of the line of step 5."""

    def write(self, text: str) -> int:
        if "step 5/" in text:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


@pytest.mark.usefixtures("hangup")
def test_a_terminal_that_closes_costs_no_step(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell and the kernel both tell of it, and what is written to the terminal from then on fails.
    monkeypatch.setattr("loramux_trainer.run.ProgressCallback", _StopsAfter)
    monkeypatch.setattr(_StopsAfter, "number", signal.SIGHUP)
    monkeypatch.setattr(_StopsAfter, "times", 2)
    shown = _ClosedTerminal()
    monkeypatch.setattr(sys, "stderr", shown)
    config = settings("closed", log_steps=1)
    with pytest.raises(Interrupted, match="after step 5 of 12") as caught:
        train(config)
    assert caught.value.exit_code == 129
    assert "step 4/12" in shown.getvalue()
    assert [path.name for path in config.output.glob("checkpoints/*")] == ["checkpoint-5"]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.usefixtures("hangup")
def test_nohup_keeps_a_run_going(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux_trainer.run.ProgressCallback", _StopsAfter)
    monkeypatch.setattr(_StopsAfter, "number", signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert train(settings(), console=QUIET).manifest["steps"] == 12


def _unfinished(run: Path) -> Path:
    """As if the run had died after its last checkpoint."""
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    return run / "checkpoints"


def test_a_run_that_died_before_its_export_takes_no_further_step(settings: Settings) -> None:
    config = settings(schedule="constant", max_steps=7, save_steps=3, keep_checkpoints=3)
    done = train(config, console=QUIET)
    expected = _files(done.adapter)
    checkpoints = _unfinished(config.output)
    assert train(config, resume=True, console=QUIET).manifest["steps"] == 7
    assert _files(done.adapter) == expected

    # A checkpoint that was cut short is passed over; what is no checkpoint as well.
    _unfinished(config.output)
    os.truncate(checkpoints / "checkpoint-7" / "optimizer.pt", 100)
    os.truncate(checkpoints / "checkpoint-6" / "adapter_model.safetensors", 100)
    (checkpoints / "checkpoint-x").mkdir()
    with (config.output / "metrics.jsonl").open("a") as stream:
        stream.write("\0\0\n[]\n")
    train(config, resume=True, console=QUIET)
    assert _files(done.adapter) == expected


def test_patience_goes_on_where_the_stopped_run_left_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rising = {"keep": "best", "patience": 2, "eval_steps": 2, "learning_rate": 0.3, "schedule": "constant"}
    whole = train(settings("whole", **rising, epochs=10.0), console=QUIET)
    config = settings("stopped", **rising, epochs=10.0)
    with monkeypatch.context() as patch:
        patch.setattr("loramux_trainer.run.ProgressCallback", _StopsAfter)
        with pytest.raises(Interrupted, match="after step 5 of"):
            train(config, console=QUIET)
    resumed = train(config, resume=True, console=QUIET)
    assert _files(resumed.adapter) == _files(whole.adapter)
    _unfinished(config.output)
    again = train(config, resume=True, console=QUIET)
    assert _files(again.adapter) == _files(whole.adapter), "a run out of patience stays so"

    _unfinished(config.output)
    config.output.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="was moved; its best state is noted as"):
        train(config.model_copy(update={"output": tmp_path / "moved"}), resume=True, console=QUIET)


@pytest.mark.parametrize("text", ["[]", "null", "{", "3", "[" * 100_000])
def test_a_damaged_run_file_is_named(settings: Settings, text: str) -> None:
    config = settings()
    with pytest.raises(ConfigError, match="holds no run to resume; start one without --resume"):
        train(config, resume=True, console=QUIET)
    config.output.mkdir()
    (config.output / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json is damaged"):
        train(config, resume=True, console=QUIET)
