"""The slow path: transformers' own modules on packed batches, through its `AttentionInterface` and our paged attention.

Oracle of self-test and tests, and the way to try a family before the fused layer knows it. Base model only.
"""

import contextvars
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from loramux_base import nf4
from loramux_server.kernels.attention import paged_attention
from loramux_server.kernels.batch import ForwardBatch
from loramux_server.model.spec import ModelSpec, parse_config
from loramux_server.model.weights import WeightSource

ATTENTION_NAME = "loramux_paged"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What attention needs and transformers does not carry to it."""

    batch: ForwardBatch
    kv: Sequence[Tensor]


_step: contextvars.ContextVar[_Step] = contextvars.ContextVar("loramux_paged_step")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface: query, key, value `[1, heads, T, D]` -> `[1, T, heads, D]`."""
    step = _step.get()
    cache = step.kv[int(module.layer_idx)]  # type: ignore[arg-type]
    page = torch.div(step.batch.kv_slots, step.batch.page_size, rounding_mode="floor")
    offset = step.batch.kv_slots % step.batch.page_size
    cache[page, 0, offset] = key[0].transpose(0, 1)
    cache[page, 1, offset] = value[0].transpose(0, 1)
    out = paged_attention(
        query[0].transpose(0, 1).contiguous(),
        cache,
        step.batch,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


def reference_module(
    spec: ModelSpec,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "eager",
) -> PreTrainedModel:
    """The transformers model with our weights: NF4 weights are dequantized first.

    Args:
        spec: Flags.
        source: Weights by parameter name.
        dtype: Of weights and computation.
        device: Where it runs.
        attention: `eager`, or `ATTENTION_NAME` for packed batches.
    """
    AttentionInterface.register(ATTENTION_NAME, _attention)
    config = parse_config(spec.config)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.tie_weights()
    for name, _ in model.named_parameters():
        module = name.removesuffix(".weight")
        if isinstance(model.get_submodule(module) if module != name else None, nn.Linear) and name != "lm_head.weight":
            weight = source.linear(name)
            value = weight if isinstance(weight, Tensor) else nf4.dequantize(weight, dtype)
        else:
            value = source.tensor(name)
        set_module_tensor_to_device(model, name, device, value=value, dtype=dtype)
    model.tie_weights()
    nn.Module.to(model, device)  # buffers: rotary frequencies
    model.eval()
    return model


class ReferenceLM:
    """`CausalLM`'s face over transformers' modules."""

    def __init__(self, spec: ModelSpec, source: WeightSource, *, dtype: torch.dtype, device: torch.device) -> None:
        """Build the modules.

        Args:
            spec: Flags.
            source: Weights by parameter name.
            dtype: Of weights and computation.
            device: Where it runs.
        """
        self.spec = spec
        self._model = reference_module(spec, source, dtype=dtype, device=device, attention=ATTENTION_NAME)

    @torch.no_grad()
    def logits(self, batch: ForwardBatch, kv: Sequence[Tensor]) -> Tensor:
        """`[R, V]` float32 logits of the batch's wanted rows; keys and values are written to kv."""
        token = _step.set(_Step(batch=batch, kv=kv))
        try:
            output = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
        finally:
            _step.reset(token)
        logits: Tensor = output.logits[0].float()
        return logits
