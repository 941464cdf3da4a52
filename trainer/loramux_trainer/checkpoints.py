"""Checkpoints of a run: which one a resumed run goes on from, and when a run that has patience is over."""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from loramux_base.checkpoint import read_header
from loramux_trainer.errors import ConfigError

COUNTERS_NAME = "loramux_counters.json"
"""File in a checkpoint with what the run counted so far; it is written last."""

_NAME = re.compile(r"checkpoint-([0-9]+)")
_ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_TENSORS = "adapter_model.safetensors"


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that were done when it was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is no checkpoint"
    return int(match[1])


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; one that a crash or a full disk has cut is passed over.

    Raises:
        ConfigError: It says that the best state lies elsewhere: the run was moved.
    """
    named = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    for path in sorted(named, key=step_of, reverse=True):
        if _is_whole(path):
            best = read_state(path).best_model_checkpoint
            if best is not None and Path(best).resolve().parent != directory.resolve():
                raise ConfigError(f"output: {directory} was moved; its best state is noted as {best}. Move it back")
            return path
    return None


def read_state(checkpoint: Path) -> TrainerState:
    """What the loop knew when the checkpoint was written."""
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state


def out_of_patience(log: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations brought no lower loss.

    Args:
        log: The loop's log; it is in each checkpoint, so that a resumed run counts on where the other stopped.
        patience: Evaluations.
    """
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


class PatienceCallback(TrainerCallback):
    """Ends the run when it gets no better.

    Args:
        patience: Evaluations without a lower loss.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> TrainerControl:
        """Look at the losses so far."""
        if out_of_patience(state.log_history, self._patience):
            control.should_training_stop = True
        return control


def _is_whole(checkpoint: Path) -> bool:
    try:
        for name in (COUNTERS_NAME, TRAINER_STATE_NAME):
            json.loads((checkpoint / name).read_bytes())
        read_header(checkpoint / _TENSORS)
    except (OSError, ValueError):  # ModelLoadError is a ValueError
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in _ARCHIVES)
