"""Build a `CausalLM` from a model directory.

Weights modes: `nf4` (the directory's NF4 bytes, or quantized at load, which is recorded), `bf16`, `fp32`. Tensors are
read straight into the fused layers; transformers' modules are never built here.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loramux_base import nf4
from loramux_base.checkpoint import Checkpoint, ModelLoadError
from loramux_base.fingerprint import base_fingerprint
from loramux_base.nf4 import Nf4Weight
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.decoder_layer import DecoderLayer, LayerWeights
from loramux_server.model.linear import Linear, TuningTable
from loramux_server.model.names import LayerNames
from loramux_server.model.rope import cos_sin
from loramux_server.model.spec import ModelSpec
from loramux_server.model.tuning import find_tuning
from loramux_server.model.weights import CheckpointSource, WeightSource

_log = logging.getLogger(__name__)


def default_dtype(device: torch.device) -> torch.dtype:
    """Compute dtype: on CUDA bfloat16 from capability 8.0, float16 before; float32 on the CPU (faster there)."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_model(
    directory: str | Path,
    *,
    weights: str,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    shadow: bool | None = None,
    batch_invariant: bool = False,
    max_positions: int | None = None,
    table: TuningTable | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load a base model; its details have the prefill chunk that was best on this card, if it was measured.

    Args:
        directory: Of the checkpoint.
        weights: `nf4`, `bf16` or `fp32`.
        device: `cpu`, `cuda`, ...
        dtype: Compute dtype; None = float32 for fp32 weights, else `default_dtype`.
        shadow: Keep a dequantized copy of NF4 weights instead of the bytes; None = on the CPU yes, on CUDA no.
        batch_invariant: Make a row's result independent of the other rows.
        max_positions: Rows of the rotary tables; None = all that the model was made for.
        table: Measured backend choices; None = those of the card, if it was tuned.
        progress: Called with (layers done, layers).

    Raises:
        ModelLoadError: Unusable directory; the text names file and way out.
        UnsupportedModel: The config asks for what is not served.
    """
    device = torch.device(device)
    checkpoint = Checkpoint(directory)
    spec = ModelSpec.from_config(checkpoint.config)
    source = CheckpointSource(checkpoint, weights=weights)
    dtype = dtype or (torch.float32 if weights == "fp32" else default_dtype(device))
    shadow = device.type == "cpu" if shadow is None else shadow
    chunk: int | None = None
    if table is None and device.type == "cuda" and weights == "nf4" and not shadow:
        found = find_tuning(torch.cuda.get_device_name(device), spec)
        if found is not None:
            # Batch-invariant products are others than those that the chunk was measured with.
            table, chunk = found.table(), None if batch_invariant else found.chunk(spec)
    tuned = table is not None
    model = assemble(
        spec,
        source,
        dtype=dtype,
        device=device,
        shadow=shadow,
        batch_invariant=batch_invariant,
        max_positions=max_positions,
        table=table,
        progress=progress,
    )
    model.fingerprint = base_fingerprint(directory, quantized_at_load="nf4" if source.quantized_at_load else None)
    product = model.layers[0].weights.gate_up
    model.details.update(
        weights=weights,
        decode_product=product.backend(1),
        prefill_product=product.backend(512),
        tuned=tuned,
        quantized_at_load=source.quantized_at_load,
        shadow=shadow and weights == "nf4",
        batch_invariant=batch_invariant,
    )
    if chunk is not None:
        model.details["tuned_prefill_chunk"] = chunk
    _log.info("loaded %s: %s", checkpoint.directory.name, model.details)
    return model


def assemble(
    spec: ModelSpec,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shadow: bool = True,
    batch_invariant: bool = False,
    max_positions: int | None = None,
    table: TuningTable | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Build the model from a source of weights.

    Args:
        spec: Flags.
        source: Weights by parameter name.
        dtype: Compute dtype.
        device: Where it runs.
        shadow: As in `load_model`.
        batch_invariant: As in `load_model`.
        max_positions: As in `load_model`.
        table: As in `load_model`.
        progress: As in `load_model`.

    Raises:
        ModelLoadError: A tensor is missing or has the wrong shape.
    """
    builder = _Builder(spec, source, dtype, device, shadow, batch_invariant, table)
    tables = [cos_sin(rope, min(max_positions or spec.max_position, spec.max_position), device) for rope in spec.ropes]
    layers: list[DecoderLayer] = []
    for index, layer in enumerate(spec.layers):
        layers.append(
            DecoderLayer(spec, index, builder.layer(index), tables[layer.rope], batch_invariant=batch_invariant)
        )
        if progress is not None:
            progress(index + 1, spec.num_layers)
    embedding = builder.dense("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
    head_weight = embedding
    if not spec.tied_embeddings:
        head_weight = builder.dense("lm_head.weight", (spec.vocab_size, spec.hidden_size))
    model = CausalLM(
        spec,
        embedding=embedding,
        layers=layers,
        norm=builder.dense("model.norm.weight", (spec.hidden_size,)),
        head=Linear(head_weight, None, dtype=dtype, device=device, batch_invariant=batch_invariant),
        tables=tables,
    )
    model.details.update(
        family=spec.family,
        compute_dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        resident_weight_bytes=model.resident_weight_bytes,
        linear_weight_bytes=model.linear_weight_bytes,
    )
    return model


class _Builder:
    """Reads and fuses weights of one model."""

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        shadow: bool,
        batch_invariant: bool,
        table: TuningTable | None,
    ) -> None:
        self._spec = spec
        self._source = source
        self._dtype = dtype
        self._device = device
        self._shadow = shadow
        self._batch_invariant = batch_invariant
        self._table = table

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor on the device in the compute dtype, in memory of its own."""
        tensor = self._source.tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(name, f"has shape {tuple(tensor.shape)}, the config asks for {shape}")
        # a copy even where nothing changes: the source may be a mapped file that somebody truncates
        return tensor.to(device=self._device, dtype=self._dtype, copy=True)

    def layer(self, index: int) -> LayerWeights:
        """Weights of a decoder layer."""
        spec, names = self._spec, LayerNames(spec=self._spec, index=index)
        hidden = (spec.hidden_size,)
        inner = spec.num_heads * spec.head_dim
        outer = spec.num_kv_heads * spec.head_dim
        qk = (spec.head_dim,)
        return LayerWeights(
            qkv=self._linear(names.qkv, inner + 2 * outer, spec.hidden_size, bias=spec.qkv_bias),
            o=self._linear(names.o, spec.hidden_size, inner, bias=spec.output_bias),
            gate_up=self._linear(names.gate_up, 2 * spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias),
            down=self._linear(names.down, spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias),
            input_norm=self.dense(names.input_norm, hidden),
            mlp_norm=self.dense(names.mlp_norm, hidden),
            post_attention_norm=self.dense(names.post_attention_norm, hidden) if spec.sandwich_norms else None,
            post_mlp_norm=self.dense(names.post_mlp_norm, hidden) if spec.sandwich_norms else None,
            q_norm=self.dense(names.q_norm, qk) if spec.qk_norm else None,
            k_norm=self.dense(names.k_norm, qk) if spec.qk_norm else None,
        )

    def _linear(self, modules: tuple[str, ...], n: int, k: int, *, bias: bool) -> Linear:
        """Modules joined along the output width."""
        weights = [self._source.linear(name + ".weight") for name in modules]
        joined = _join(modules, weights)
        if tuple(joined.shape) != (n, k):
            raise ModelLoadError(modules[0], f"joined shape {tuple(joined.shape)}, the config asks for {(n, k)}")
        extra = [name for name in modules if not bias and name + ".bias" in self._source]
        if extra:
            raise ModelLoadError(extra[0], "has a bias that the config does not declare")
        return Linear(
            joined,
            torch.cat([self._source.tensor(name + ".bias") for name in modules]) if bias else None,
            dtype=self._dtype,
            device=self._device,
            shadow=self._shadow,
            batch_invariant=self._batch_invariant,
            table=self._table,
        )


def _join(modules: tuple[str, ...], weights: list[Tensor | Nf4Weight]) -> Tensor | Nf4Weight:
    quantized = [weight for weight in weights if isinstance(weight, Nf4Weight)]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if quantized and dense:
        raise ModelLoadError(modules[0], f"{', '.join(modules)} must be all quantized or all dense to be fused")
    return nf4.concatenate(quantized) if quantized else torch.cat(dense)
