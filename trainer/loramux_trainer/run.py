"""One training run: check everything, then train, evaluate and export into its directory."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from loramux_trainer import screen
from loramux_trainer.base import Base, Numerics, choose_numerics, load_model, open_base
from loramux_trainer.checkpoints import PatienceCallback, last_checkpoint, out_of_patience, read_state, step_of
from loramux_trainer.config import DEFAULT_LENGTH, RunConfig
from loramux_trainer.data.codec import Codec
from loramux_trainer.data.prepared import PreparedData, prepare
from loramux_trainer.errors import ConfigError, Interrupted, OutOfMemory
from loramux_trainer.evaluate import evaluate
from loramux_trainer.export import export_adapter
from loramux_trainer.lora import add_lora
from loramux_trainer.progress import MetricsLog, ProgressCallback
from loramux_trainer.sft import AdapterTrainer, training_arguments

ADAPTER_NAME = "adapter"
CHECKPOINTS_NAME = "checkpoints"
METRICS_NAME = "metrics.jsonl"
RUN_NAME = "run.json"
RESULT_NAME = "result.json"
_VERSIONED = ("torch", "transformers", "peft", "trl", "accelerate", "tokenizers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave.

    Attributes:
        adapter: Directory of the adapter.
        digest: Version digest of it.
        manifest: What the manifest says beside the base.
        seconds: Wall time of the call.
    """

    adapter: Path
    digest: str
    manifest: dict[str, Any]
    seconds: float


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None) -> Result:
    """Run a training.

    Args:
        config: Of the run.
        resume: Go on from the last checkpoint in `config.output`, or begin if there is none.
        console: Where progress goes; None = stderr.

    Raises:
        ConfigError: A setting, the base, or an output directory of another run; nothing was written.
        DataError: The data; nothing was written.
        OutOfMemory: A batch does not fit.
        NonFinite: Loss, gradient or adapter became NaN; no adapter was written.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; a checkpoint was written.
    """
    console = console or screen.console("stderr")
    started = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("training on several devices is not there yet; start one process, without a launcher")
    numerics = choose_numerics(config.device)
    if config.train.optimizer == "paged_adamw_8bit" and numerics.device.type != "cuda":
        raise ConfigError("train.optimizer: paged_adamw_8bit needs CUDA; use adamw")
    base = open_base(config.base)
    codec = Codec.from_directory(config.base)
    data = prepare(config.data, codec, seed=config.seed, max_length=_max_length(config, base))
    _check_ids(base, data)
    per_epoch = _steps_per_epoch(config, data)
    steps = config.train.max_steps or max(1, math.ceil(config.train.epochs * per_epoch))
    identity = _identity(config, base, data, numerics)
    with _unwritable(config.output):
        checkpoint = _check_output(config.output, identity, resume=resume)
    _say_data(console, base, data, steps)
    with _out_of_memory(config):
        model = add_lora(load_model(base, numerics), config.lora, seed=config.seed)
    with _out_of_memory(config), _unwritable(config.output):
        config.output.mkdir(parents=True, exist_ok=True)
        _write_json(config.output / RUN_NAME, {**identity, "config": config.plain()})
        trainer = AdapterTrainer(
            model,
            training_arguments(config, numerics, directory=config.output.absolute() / CHECKPOINTS_NAME, steps=steps),
            codec=codec,
            tokenizer_file=config.base / "tokenizer.json",
            train=data.train,
            validation=data.validation,
            eval_batch_size=config.evaluation.batch_size,
        )
        done = 0 if checkpoint is None else step_of(checkpoint)
        log = MetricsLog(config.output / METRICS_NAME, from_step=done)
        try:
            progress = ProgressCallback(console, log)
            trainer.add_callback(progress)
            if config.train.patience is not None:
                trainer.add_callback(PatienceCallback(config.train.patience))
            with progress.running(steps, done), warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)
                if checkpoint is not None and _is_done(config, checkpoint, steps):
                    trainer.restore(checkpoint)
                else:
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            ended = trainer.state.global_step
            if progress.stopped is not None and ended < steps:
                raise Interrupted(f"stopped after step {ended} of {steps}; go on with --resume", progress.stopped)
            _check_counted(trainer, data, ended, per_epoch)
            facts = {**_facts(config, base, data, numerics), "steps": ended, "loss_tokens_trained": trainer.loss_tokens}
            if config.train.keep == "best":
                facts["best_step"] = trainer.state.best_global_step
            if data.validation:
                facts["evaluation"] = _compare(trainer, model, data, codec, config, numerics)
                log.write(ended, {"evaluation": facts["evaluation"]})
        finally:
            log.close()
        digest = export_adapter(model, base, config.output / ADAPTER_NAME, facts)
        seconds = time.monotonic() - started
        result = {"digest": digest, "seconds": round(seconds, 3), "device": str(numerics.device), **facts}
        _write_json(config.output / RESULT_NAME, result)
    return Result(adapter=config.output / ADAPTER_NAME, digest=digest, manifest=facts, seconds=seconds)


def _max_length(config: RunConfig, base: Base) -> int:
    wanted = config.data.max_length
    if wanted is None:
        return min(DEFAULT_LENGTH, base.positions or DEFAULT_LENGTH)
    if base.positions is not None and wanted > base.positions:
        raise ConfigError(f"data.max_length: is {wanted}, the base has {base.positions} positions")
    return wanted


def _check_ids(base: Base, data: PreparedData) -> None:
    largest = max(max(sequence.input_ids) for sequence in (*data.train, *data.validation))
    if largest >= base.vocab_size:
        raise ConfigError(
            f"base: {base.directory}: its tokenizer gives token id {largest}, its model has {base.vocab_size}; they do "
            "not belong together"
        )


def _steps_per_epoch(config: RunConfig, data: PreparedData) -> int:
    batches = math.ceil(len(data.train) / config.train.batch_size)
    return math.ceil(batches / config.train.accumulation)


def _identity(config: RunConfig, base: Base, data: PreparedData, numerics: Numerics) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "config_sha256": config.digest(),
        "base_fingerprint": base.fingerprint.hex,
        "data": data.report,
        "compute": str(numerics.compute).removeprefix("torch."),
    }


def _check_output(output: Path, identity: dict[str, Any], *, resume: bool) -> Path | None:
    """Check the run's directory; the checkpoint to go on from, if any.

    Raises:
        ConfigError: The directory is in use by a run that is finished or different, or there is nothing to resume.
    """
    if output.is_symlink() and not output.exists():
        raise ConfigError(f"output: {output} is a link to nothing; give another directory")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is no directory; give another one")
    if not resume:
        if output.exists() and any(output.iterdir()):
            raise ConfigError(f"output: {output} exists and is not empty; give another directory, or --resume")
        above = next(path for path in (output, *output.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"output: {output} cannot be made in {above}; give another directory")
        return None
    if (output / ADAPTER_NAME).exists():
        raise ConfigError(f"output: {output} holds a finished run; give another directory")
    try:
        stored = json.loads((output / RUN_NAME).read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"output: {output} holds no run to resume; start one without --resume") from error
    except (ValueError, RecursionError) as error:
        stored = error
    if not isinstance(stored, dict):
        raise ConfigError(f"output: {output / RUN_NAME} is damaged; give another directory and start anew")
    if changed := [name for name, value in identity.items() if stored.get(name) != value]:
        raise ConfigError(
            f"output: the run in {output} differs in {', '.join(changed)}; resume needs equal settings, base and data"
        )
    return last_checkpoint(output.absolute() / CHECKPOINTS_NAME)


def _is_done(config: RunConfig, checkpoint: Path, steps: int) -> bool:
    """Whether nothing but evaluation and export is left."""
    patience = config.train.patience
    return step_of(checkpoint) >= steps or (
        patience is not None and out_of_patience(read_state(checkpoint).log_history, patience)
    )


def _say_data(console: Console, base: Base, data: PreparedData, steps: int) -> None:
    train, held = data.report["train"], data.report["validation"]
    console.print(
        f"training on {base.directory.absolute().name} ({base.quantization}, {base.fingerprint.hex[:12]}): "
        f"{train['conversations']} conversations to train on, {held['conversations']} held out, "
        f"{data.report['duplicates']} duplicates and {train['too_long'] + held['too_long']} too long left out, "
        f"{train['loss_tokens']} of {train['tokens']} tokens carry loss, {steps} steps",
        markup=False,  # names of files and directories may look like it
        highlight=False,
        soft_wrap=True,
    )
    for place in (*train["too_long_places"], *held["too_long_places"])[:5]:
        console.print(f"left out: {place}", markup=False, highlight=False, soft_wrap=True)


def _check_counted(trainer: AdapterTrainer, data: PreparedData, steps: int, per_epoch: int) -> None:
    """After whole epochs the loop must have seen each loss token of the report once an epoch."""
    if steps % per_epoch == 0:
        expected = steps // per_epoch * data.report["train"]["loss_tokens"]
        assert trainer.loss_tokens == expected, f"trained {trainer.loss_tokens} loss tokens, the data has {expected}"


def _compare(
    trainer: AdapterTrainer,
    model: Any,
    data: PreparedData,
    codec: Codec,
    config: RunConfig,
    numerics: Numerics,
) -> dict[str, Any]:
    """Base and adapter on the held-out data."""
    adapter = trainer.validate()
    with model.disable_adapter(), trainer.compute_loss_context_manager():
        base = evaluate(
            model,
            data.validation,
            pad_id=codec.pad_id,
            batch_size=config.evaluation.batch_size,
            device=numerics.device,
        )
    return {"base": base.plain(), "adapter": adapter.plain()}


def _facts(config: RunConfig, base: Base, data: PreparedData, numerics: Numerics) -> dict[str, Any]:
    lora = config.lora
    report = {
        name: {key: value for key, value in part.items() if key != "too_long_places"}
        if isinstance(part, dict)
        else part
        for name, part in data.report.items()
    }
    return {
        "config_sha256": config.digest(),
        "data": report,
        "lora": {"r": lora.r, "alpha": lora.alpha, "rslora": lora.rslora, "modules": list(lora.modules)},
        "numerics": {
            "base": base.quantization,
            "compute": str(numerics.compute).removeprefix("torch."),
            "adapter": "float32",
        },
        "seed": config.seed,
        "default_system": config.data.default_system,
        "normalize": config.data.normalize,
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }


@contextlib.contextmanager
def _out_of_memory(config: RunConfig) -> Iterator[None]:
    """Turn the allocator's error into ours."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator raises no class of its own
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory: you tried to allocate" not in text:
            raise
        raise OutOfMemory(
            f"out of memory at train.batch_size {config.train.batch_size} ({text.splitlines()[0]}); lower batch_size "
            "and raise accumulation by the same factor, lower data.max_length, or turn gradient_checkpointing on"
        ) from error


@contextlib.contextmanager
def _unwritable(output: Path) -> Iterator[None]:
    """Turn what the file system refuses into our error."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output: {output} cannot be used ({error.strerror or error}); make room or give another directory. What "
            "was saved there before can be resumed"
        ) from error


def _write_json(file: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)
