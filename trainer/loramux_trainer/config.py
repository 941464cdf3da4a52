"""Settings of a training run: strict pydantic models. `config_file` reads them from YAML."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from loramux_base.shapes import MODULE_PARENTS

MODULES = tuple(MODULE_PARENTS)
"""Linears that an adapter may target, the names that the server knows."""

MAX_RANK = 256
"""Largest rank that is trained; servers take 64 unless told otherwise."""

DEFAULT_LENGTH = 1024
"""Longest sequence, tokens, unless set or the base has fewer positions."""

MAX_COUNT = 10**9
"""Largest count of steps and the like; the libraries below do not take any number."""


def _usable(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path cannot hold the character NUL")
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise ValueError("the path is not UTF-8, which tokenizers and safetensors need; rename it")
    return path


Format = Literal["auto", "openai", "dialogue", "conversation"]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
LocalPath = Annotated[Path, Field(strict=False), pydantic.AfterValidator(_usable)]
Paths = Annotated[tuple[LocalPath, ...], Field(min_length=1, strict=False)]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which conversations are trained on.

    Attributes:
        train: JSONL or JSON files.
        validation: Files held out by the user; empty = a share of `train` is.
        validation_share: Share of the conversations held out when `validation` is empty; 0 = no evaluation.
        format: Shape of a record; `auto` tells it from the record's keys.
        group_key: Field of a record; records of one value stay on one side of the split. None = records with the same
            user turns do.
        default_system: System prompt of conversations that have none; None adds nothing.
        normalize: Unicode form of the trained text. NFKC rewrites what the model learns to write (superscripts,
            full-width punctuation); comparison for duplicates uses it in any case.
        max_length: Longest sequence, tokens; None = `DEFAULT_LENGTH`, or what the base has positions for if fewer.
        too_long: What happens to a longer one: `drop` leaves it out and reports it, `error` stops.
    """

    train: Paths
    validation: Annotated[tuple[LocalPath, ...], Field(strict=False)] = ()
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    format: Format = "auto"
    group_key: Annotated[str, Field(min_length=1)] | None = None
    default_system: str | None = None
    normalize: Literal["none", "nfc", "nfkc"] = "nfc"
    max_length: Annotated[int, Field(ge=8, le=MAX_COUNT)] | None = None
    too_long: Literal["drop", "error"] = "drop"

    @pydantic.field_validator("default_system")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("has no text; null adds no system prompt")
        return value


class LoraConfig(_Section):
    """The adapter.

    Attributes:
        r: Rank.
        alpha: Numerator of the scale alpha / r.
        dropout: Of the adapter's input while training.
        rslora: Scale by alpha / sqrt(r).
        target_modules: `all-linear` or names of linears.
    """

    r: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    alpha: Annotated[int, Field(ge=1, le=100 * MAX_RANK)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = "all-linear"

    @pydantic.field_validator("target_modules", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value == "all-linear":
            return value
        if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
            raise ValueError(f"must be all-linear or a list of {', '.join(MODULES)}")
        if unknown := sorted(set(value) - set(MODULES)):
            raise ValueError(f"unknown modules {', '.join(unknown)}; the server takes {', '.join(MODULES)}")
        return value

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the targeted linears."""
        if isinstance(self.target_modules, str):
            return MODULES
        return tuple(name for name in MODULES if name in self.target_modules)


class TrainConfig(_Section):
    """The loop.

    Attributes:
        epochs: Passes over the data; ignored if `max_steps` is given.
        max_steps: Optimizer steps.
        batch_size: Conversations a forward pass.
        accumulation: Forward passes an optimizer step.
        learning_rate: Highest rate.
        schedule: Course of the rate after the warm-up.
        warmup: Share of the steps in which the rate rises.
        clip: Largest gradient norm.
        weight_decay: Of AdamW.
        optimizer: `paged_adamw_8bit` needs CUDA.
        gradient_checkpointing: Recompute activations; None = on CUDA yes, on the CPU no.
        log_steps: Steps between two lines of metrics.
        eval_steps: Steps between two evaluations; None = at the end of the run only.
        save_steps: Steps between two checkpoints; None = at the end of the run only.
        keep_checkpoints: Newest checkpoints that are kept.
        keep: Which state becomes the adapter: the last, or the one with the lowest loss on held-out data; then a
            checkpoint is written at every evaluation.
        patience: Evaluations without a lower loss after which the run ends; None = it does not. Needs `keep: best`.
    """

    epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    max_steps: Count | None = None
    batch_size: Count = 8
    accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    gradient_checkpointing: bool | None = None
    log_steps: Count = 10
    eval_steps: Count | None = None
    save_steps: Count | None = None
    keep_checkpoints: Count = 2
    keep: Literal["last", "best"] = "last"
    patience: Count | None = None

    @pydantic.model_validator(mode="after")
    def _best(self) -> Self:
        if self.keep == "best" and self.eval_steps is None:
            raise ValueError("keep: best needs eval_steps")
        if self.keep == "best" and self.save_steps not in (None, self.eval_steps):
            raise ValueError("keep: best saves at every evaluation; leave save_steps out")
        if self.patience is not None and self.keep != "best":
            raise ValueError("patience needs keep: best")
        return self


class EvalConfig(_Section):
    """Teacher-forced evaluation.

    Attributes:
        batch_size: Conversations a forward pass; results do not depend on it.
    """

    batch_size: Count = 8


class RunConfig(_Section):
    """A whole run.

    Attributes:
        base: Directory of the base model that the server serves, best made by `loramux-server quantize`.
        output: Directory of the run; made by it.
        seed: Of the split, the adapter's start, dropout and the order of the data.
        device: `auto` takes CUDA where there is one.
        data: Conversations.
        lora: Adapter.
        train: Loop.
        evaluation: Evaluation.
    """

    base: LocalPath
    output: LocalPath
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()

    @pydantic.model_validator(mode="after")
    def _steps(self) -> Self:
        if self.train.eval_steps is not None and not self.data.validation and self.data.validation_share == 0:
            raise ValueError("train.eval_steps needs validation data: set data.validation or data.validation_share")
        return self

    def plain(self) -> dict[str, Any]:
        """As plain JSON data."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 over all settings that change the adapter, not over where files lie and how often is logged."""
        value = self.plain()
        for name in ("base", "output", "device", "evaluation"):
            del value[name]
        for name in ("train", "validation"):
            del value["data"][name]
        for name in ("log_steps", "save_steps", "keep_checkpoints"):
            del value["train"][name]
        if self.train.keep == "last":
            del value["train"]["eval_steps"]
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
