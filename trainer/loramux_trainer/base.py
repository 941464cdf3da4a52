"""Loads the frozen base: on CUDA as 4-bit linears, on the CPU as dense float32 weights dequantized from the same bytes.

The CPU has its own way for two reasons. bitsandbytes' product repacks weights and computes in bfloat16 in evaluation
mode on processors with AVX512-BF16, so that training and evaluation would see two models; and transformers loads a
pre-quantized checkpoint's norms and embeddings in their stored dtype whatever `dtype` says. Dequantized with
`loramux_base.nf4`, the weights are those of the server's CPU engine, bit for bit.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from loramux_base import nf4
from loramux_base.checkpoint import Checkpoint, ModelLoadError
from loramux_base.fingerprint import Fingerprint, base_fingerprint
from loramux_base.nf4 import Nf4Error
from loramux_base.shapes import BaseShapes, UnsupportedBase, base_shapes
from loramux_base.tensors import TensorReader
from loramux_trainer.errors import ConfigError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
"""`model_type` of the bases that the server takes adapters for."""

_HELPERS = (nf4.SUFFIX_ABSMAX, nf4.SUFFIX_MAP, nf4.SUFFIX_STATE, nf4.SUFFIX_NESTED_ABSMAX, nf4.SUFFIX_NESTED_MAP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What is known of a base without its weights.

    Attributes:
        directory: Of the checkpoint.
        config: Its config.json.
        shapes: Its linears.
        fingerprint: Of it.
        quantization: `nf4` or `none`.
        positions: Longest sequence that it was made for; None if its configuration does not say.
        vocab_size: Rows of its embedding.
    """

    directory: Path
    config: dict[str, Any]
    shapes: BaseShapes
    fingerprint: Fingerprint
    quantization: str
    positions: int | None
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numerics:
    """Where and in what precision a run computes.

    Attributes:
        device: The device.
        compute: dtype of products with the base.
    """

    device: torch.device
    compute: torch.dtype


def open_base(directory: Path) -> Base:
    """Check a base and take its fingerprint.

    Raises:
        ConfigError: Not a checkpoint that can be trained on.
    """
    try:
        checkpoint = Checkpoint(directory)
        stored = checkpoint.config.get("quantization_config")
        named = stored if isinstance(stored, dict) else {"quant_method": stored}
        method, kind = named.get("quant_method"), named.get("bnb_4bit_quant_type")
        if stored is not None and (method, kind) != ("bitsandbytes", "nf4"):
            raise ConfigError(
                f"base: {directory} is quantized as {method!r}, not as NF4; take the directory that "
                "`loramux-server quantize` wrote"
            )
        shapes = base_shapes(checkpoint.config)
        family = checkpoint.config.get("model_type")
        if family not in FAMILIES:
            raise ConfigError(
                f"base: {directory}: model_type is {family!r}, which the server does not serve; take one of "
                f"{', '.join(FAMILIES)}"
            )
        return Base(
            directory=directory,
            config=dict(checkpoint.config),
            shapes=shapes,
            fingerprint=base_fingerprint(directory),
            quantization="none" if stored is None else "nf4",
            positions=_whole(checkpoint.config.get("max_position_embeddings")),
            vocab_size=_whole(checkpoint.config.get("vocab_size")) or 0,
        )
    except ModelLoadError as error:
        raise ConfigError(f"base: {error}") from error
    except UnsupportedBase as error:
        raise ConfigError(f"base: {directory}: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"base: {directory}: one of its text files is not UTF-8 ({error.reason})") from error
    except RecursionError as error:
        raise ConfigError(f"base: {directory}: one of its JSON files is nested too deeply") from error
    except OSError as error:
        raise ConfigError(f"base: {directory} cannot be read ({error.strerror or error})") from error


def choose_numerics(device: str) -> Numerics:
    """Device and dtype: bfloat16 on CUDA, float32 on the CPU (bfloat16 is many times slower there).

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: CUDA was asked for and is not there, or is too old for bfloat16.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device: cuda was asked for, but torch sees no CUDA device; `loramux-train doctor` says more")
    if device == "cpu" or not available:
        return Numerics(device=torch.device("cpu"), compute=torch.float32)
    if torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError("device: this CUDA device has no bfloat16 (compute capability below 8.0); use device: cpu")
    return Numerics(device=torch.device("cuda", torch.cuda.current_device()), compute=torch.bfloat16)


def load_model(base: Base, numerics: Numerics) -> PreTrainedModel:
    """Load the model, frozen.

    Raises:
        ConfigError: Weights are missing or cannot be read.
    """
    try:
        load = _load_dense if numerics.device.type == "cpu" else _load_quantized
        model = load(base, numerics)
    except (ModelLoadError, Nf4Error) as error:
        raise ConfigError(f"base: {error}") from error
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _attention(base: Base) -> str:
    """Fused attention leaves a soft cap of the scores out, so such models compute it step by step."""
    return "eager" if base.config.get("attn_logit_softcapping") else "sdpa"


def _load_dense(base: Base, numerics: Numerics) -> PreTrainedModel:
    dtype = numerics.compute
    model = _empty(base, dtype)
    checkpoint = Checkpoint(base.directory)
    read = TensorReader(checkpoint)
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.tensors:
        if name.endswith(_HELPERS):
            continue
        if name + nf4.SUFFIX_STATE in checkpoint:
            nested = name + nf4.SUFFIX_NESTED_ABSMAX in checkpoint
            tensors[name] = nf4.dequantize(nf4.from_tensors(name, read, nested=nested), dtype)
        else:
            tensors[name] = read(name).to(dtype, copy=True)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:  # a line for each tensor of another shape
        lines = str(error).splitlines()
        raise ConfigError(
            f"base: {base.directory}: config.json does not fit its tensors: {lines[-1].strip()}"
        ) from error
    model.tie_weights()
    missing = [name for name in missing if model.get_parameter(name).is_meta]
    if missing or unexpected:
        names = ", ".join([*missing, *unexpected][:3])
        raise ConfigError(f"base: {base.directory}: its tensors do not fit its model class (for example {names})")
    return model


def _empty(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base.directory, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with warnings.catch_warnings(), init_empty_weights(include_buffers=False):
            warnings.simplefilter("ignore")
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_attention(base)
            )
    except Exception as error:  # what transformers raises for a wrong value is up to each model's code
        text = " ".join(str(error).split())
        raise ConfigError(f"base: {base.directory}/config.json: transformers refuses it ({text})") from error
    return model


def _load_quantized(base: Base, numerics: Numerics) -> PreTrainedModel:
    # cuDNN's backward pass gives NaN with a mask where the length is 64 over a multiple of 128 and a row's scores are
    # far below zero, as some heads of Qwen2.5's are (pytorch/pytorch#196678). The other kernels are right.
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers_logging.disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base.directory,
        dtype=numerics.compute,
        device_map={"": str(numerics.device)},
        local_files_only=True,
        attn_implementation=_attention(base),
    )
    quantized = set()
    for name, module in model.named_modules():
        if base.quantization == "nf4" and isinstance(module, nn.Linear) and hasattr(module, "compute_dtype"):
            # The file names the dtype before quantization; the product would follow it.
            linear: Any = module
            linear.compute_dtype, linear.compute_type_is_set = numerics.compute, True
            quantized.add(f"{name}.weight")
    for name, parameter in model.named_parameters():
        if name not in quantized and parameter.is_floating_point():
            parameter.data = parameter.data.to(numerics.compute)
    return model
