"""The training engine: a thin subclass of TRL's SFTTrainer that is fed our rows.

TRL brings the loop, accumulation with token-exact scaling, a fused output projection, checkpoints and resume. Ours are
rows, labels, collator, evaluation and guards, since TRL would truncate, drop, shuffle and strip rows, average metrics
per batch, cast adapters to bfloat16, let NaN pass and report home.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, TrainerControl
from trl import SFTConfig, SFTTrainer

from loramux_trainer.base import Numerics
from loramux_trainer.batches import ROWS_KEY, Collator
from loramux_trainer.checkpoints import COUNTERS_NAME, read_state
from loramux_trainer.config import RunConfig
from loramux_trainer.data.codec import IGNORED, Codec, Sequence
from loramux_trainer.errors import NonFinite
from loramux_trainer.evaluate import Evaluation, evaluate
from loramux_trainer.lora import to_float32


def training_arguments(config: RunConfig, numerics: Numerics, *, directory: Path, steps: int) -> SFTConfig:
    """Our settings as TRL's.

    Args:
        config: Of the run.
        numerics: Of the run.
        directory: For checkpoints.
        steps: Optimizer steps in all.
    """
    train = config.train
    cuda = numerics.device.type == "cuda"
    checkpointing = cuda if train.gradient_checkpointing is None else train.gradient_checkpointing
    with warnings.catch_warnings():  # TRL has its own default for a field that transformers has renamed
        warnings.filterwarnings("ignore", message=".*`gradient_checkpointing", category=FutureWarning)
        arguments = SFTConfig(**_fields(config, numerics, directory, steps, checkpointing))
    if cuda:
        arguments._n_gpu = 1  # further GPUs of the machine would be used through nn.DataParallel, which TRL refuses
    return arguments


def _fields(config: RunConfig, numerics: Numerics, directory: Path, steps: int, checkpointing: bool) -> dict[str, Any]:
    train = config.train
    cuda = numerics.device.type == "cuda"
    return {
        "output_dir": str(directory),
        "seed": config.seed,
        "data_seed": config.seed,
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if train.schedule == "constant" else train.schedule,
        "warmup_steps": math.ceil(train.warmup * steps),
        "max_grad_norm": train.clip,
        "weight_decay": train.weight_decay,
        "optim": "adamw_torch" if train.optimizer == "adamw" else "paged_adamw_8bit",
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": cuda,
        "use_cpu": not cuda,
        "logging_steps": train.log_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no" if train.eval_steps is None else "steps",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps",
        "save_steps": (train.eval_steps if train.keep == "best" else train.save_steps) or steps,
        "load_best_model_at_end": train.keep == "best",
        "metric_for_best_model": "eval_loss" if train.keep == "best" else None,
        "greater_is_better": False if train.keep == "best" else None,
        "save_total_limit": train.keep_checkpoints,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "disable_tqdm": True,
        "report_to": "none",
    }


def _dataset(sequences: tuple[Sequence, ...]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [list(sequence.input_ids) for sequence in sequences],
            "labels": [list(sequence.labels) for sequence in sequences],
            "row": list(range(len(sequences))),
        }
    )


class AdapterTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains the adapter of a PEFT model.

    Args:
        model: Base with LoRA layers.
        arguments: From `training_arguments`.
        codec: Of the base.
        tokenizer_file: tokenizer.json of the base.
        train: Training sequences.
        validation: Held out sequences; may be empty.
        eval_batch_size: Rows a forward pass of the evaluation.
    """

    control: TrainerControl

    def __init__(
        self,
        model: PeftModel,
        arguments: SFTConfig,
        *,
        codec: Codec,
        tokenizer_file: Path,
        train: tuple[Sequence, ...],
        validation: tuple[Sequence, ...],
        eval_batch_size: int,
    ) -> None:
        self.loss_tokens = 0
        self._sequences = train
        self._validation = validation
        self._codec = codec
        self._eval_batch_size = eval_batch_size
        # TRL asks for a tokenizer, of which it needs the padding alone.
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(tokenizer_file)))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(codec.pad_id)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=Collator(codec.pad_id),
            train_dataset=_dataset(train),
            eval_dataset=_dataset(validation) if validation and arguments.eval_steps else None,
            processing_class=tokenizer,
        )
        to_float32(self.model)
        self.remove_callback(PrinterCallback)
        rows = len(self.train_dataset)
        assert rows == len(train), f"TRL kept {rows} of {len(train)} rows"

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """Write no card into checkpoints; the export writes the adapter's."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            NonFinite: The loss or a gradient is NaN or infinite; names step and conversations. Nothing was updated.
        """
        rows = inputs.pop(ROWS_KEY).tolist()
        self.loss_tokens += int((inputs["labels"] != IGNORED).sum())
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finite = (
            torch.isfinite(loss)
            & torch.stack([torch.isfinite(p.grad).all() for p in self.model.parameters() if p.grad is not None]).all()
        )
        if not bool(finite):
            places = ", ".join(sorted({self._sequences[row].place for row in rows}))
            raise NonFinite(
                f"step {self.state.global_step + 1}: loss or gradient is not finite (loss {float(loss):.4g}) on "
                f"{places}; no adapter was written. Lower train.learning_rate, or look at these conversations"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without TRL's per-batch averages, which depend on the batch size."""
        self._metrics["train"].clear()
        self._metrics["eval"].clear()
        if "loss" in logs:
            logs["loss_tokens"] = self.loss_tokens
        super().log(logs, start_time)

    def validate(self) -> Evaluation:
        """Evaluate the adapter on the held-out sequences."""
        with self.compute_loss_context_manager():
            return evaluate(
                self.model,
                self._validation,
                pad_id=self._codec.pad_id,
                batch_size=self._eval_batch_size,
                device=self.args.device,
            )

    def evaluate(self, *_args: Any, metric_key_prefix: str = "eval", **_kwargs: Any) -> dict[str, float]:
        """The loop's evaluation: token-weighted, over all held-out sequences.

        Raises:
            NonFinite: The loss on the held-out data is not finite.
        """
        result = self.validate()
        if not math.isfinite(result.loss):
            raise NonFinite(f"step {self.state.global_step}: the loss on held-out data is not finite; lower the rate")
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.plain().items() if value is not None}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (directory / COUNTERS_NAME).write_text(json.dumps({"loss_tokens": self.loss_tokens}), encoding="utf-8")

    def restore(self, checkpoint: Path) -> None:
        """Take the state of a checkpoint without a further step; the loop does one even after its last.

        Args:
            checkpoint: Of a run that is done but for its export.
        """
        self.state = read_state(checkpoint)
        self._load_from_checkpoint(str(checkpoint), self.model)
        if self.args.load_best_model_at_end:
            self._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        counters = json.loads((Path(resume_from_checkpoint) / COUNTERS_NAME).read_text(encoding="utf-8"))
        self.loss_tokens = int(counters["loss_tokens"])
