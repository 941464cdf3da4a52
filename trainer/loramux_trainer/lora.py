"""Puts LoRA layers on a base, in float32, equal for equal seeds."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from loramux_trainer.config import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """Wrap the base; A is drawn from the seed, B is zero, both are float32.

    Args:
        model: The frozen base.
        config: The adapter.
        seed: Of A.
    """
    set_seed(seed)
    peft_config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=list(config.modules),
        bias="none",
    )
    with _renamed():
        wrapped: PeftModel = get_peft_model(model, peft_config)
    to_float32(wrapped)
    return wrapped


def load_lora(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Wrap the base with an adapter from disk, frozen, in evaluation mode."""
    with _renamed():
        wrapped: PeftModel = PeftModel.from_pretrained(model, str(directory))
    return wrapped


@contextlib.contextmanager
def _renamed() -> Iterator[None]:
    """PEFT still asks transformers for a name that it has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def to_float32(model: PeftModel) -> None:
    """Cast what is trained to float32: in bfloat16 most updates of a small learning rate round to nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
