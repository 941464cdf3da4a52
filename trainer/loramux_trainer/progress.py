"""What a run shows and logs: a bar on a terminal, a line now and then elsewhere, and metrics as JSON lines always."""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_LOG_ONLY = ("learning_rate", "grad_norm")
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOWN = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_perplexity", "eval_accuracy")


class MetricsLog:
    """Metrics, a JSON object a line: `step`, `seconds` since the start, and numbers by name.

    Args:
        file: Appended to.
        from_step: Lines of later steps are dropped: a resumed run computes them again.
    """

    def __init__(self, file: Path, *, from_step: int) -> None:
        kept = []
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and _step_of(line) <= from_step:
                    kept.append(line)
        file.write_text("".join(kept), encoding="utf-8")
        self._stream = file.open("a", encoding="utf-8")
        self._start = time.monotonic()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a line; numbers that JSON does not have become null."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in metrics.items()
        }
        line = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **clean}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _step_of(line: str) -> float:
    """Step of a line of metrics; infinite for one that a crash has spoilt."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _is_nohup(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


class ProgressCallback(TrainerCallback):
    """Shows the run, and stops it after the step in which SIGINT, SIGTERM or SIGHUP came.

    A second signal stops at once, except SIGHUP: a terminal that closes sends it twice.

    Args:
        console: Where to.
        log: Metrics.

    Attributes:
        stopped: The signal that asked the run to stop; None = none did.
    """

    def __init__(self, console: Console, log: MetricsLog) -> None:
        self.stopped: int | None = None
        self._console = console
        self._log = log
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._tokens: tuple[float, float] | None = None
        self._last = ""

    @contextmanager
    def running(self, steps: int, done: int) -> Iterator[None]:
        """Show the bar and take SIGINT, SIGTERM and SIGHUP as the wish to save and stop.

        A SIGHUP that is ignored stays so: `nohup` asks for a run that goes on.

        Args:
            steps: Optimizer steps in all.
            done: Of them already.
        """
        main = threading.current_thread() is threading.main_thread()
        numbers = _STOPPING if main else ()
        before = {number: signal.signal(number, self._stop) for number in numbers if not _is_nohup(number)}
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]training[/bold] {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, numbers="")
            self._bar.start()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stopped is None:
            self.stopped = number
        elif number != signal.SIGHUP:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> TrainerControl:
        """Move the bar; save and stop if that was asked for."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)
        if self.stopped is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_kwargs: Any,
    ) -> None:
        """Write the metrics and show the main ones."""
        metrics = {
            name: value for name, value in (logs or {}).items() if name not in ("epoch", "total_flos", "num_tokens")
        }
        if "train_runtime" in metrics:
            return
        now = time.monotonic()
        if (counted := metrics.get("loss_tokens")) is not None:
            if self._tokens is not None and now > self._tokens[0]:
                metrics["loss_tokens_per_second"] = round((counted - self._tokens[1]) / (now - self._tokens[0]), 1)
            self._tokens = (now, counted)
        self._log.write(state.global_step, metrics)
        shown = [f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics]
        if "loss_tokens_per_second" in metrics:
            shown.append(f"{metrics['loss_tokens_per_second']:.0f} loss tokens/s")
        if self._bar is not None and self._task is not None and "loss" in metrics:
            # The bar has one line: what is in the log only must not squeeze it.
            self._bar.update(self._task, numbers="  ".join(text for text in shown if not text.startswith(_LOG_ONLY)))
        else:
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}", highlight=False, soft_wrap=True
            )
