"""The served model: embedding, decoder layers, final norm, output projection."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_base.fingerprint import Fingerprint
from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.lora import plan_tiles
from loramux_server.kernels.norm import add_rms_norm
from loramux_server.model.decoder_layer import DecoderLayer
from loramux_server.model.linear import Linear
from loramux_server.model.slab import LoraSlab
from loramux_server.model.spec import ModelSpec


class CausalLM:
    """A causal language model on packed batches; inference only, no host synchronisation.

    Attributes:
        spec: Flags of the model.
        dtype: Compute dtype of activations and KV cache.
        device: Of everything.
        layers: Decoder layers.
        details: Facts for reports: weights mode, whether it was quantized at load, shadow, bytes.
        fingerprint: Of the base; None for a model that was not read from a directory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        norm: Tensor,
        head: Linear,
        tables: Sequence[Tensor],
        details: dict[str, Any] | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            spec: Flags of the model.
            embedding: `[V, H]` in the compute dtype.
            layers: One for each entry of `spec.layers`.
            norm: `[H]`, weight of the final norm.
            head: Output projection.
            tables: Rotary tables, counted in the resident bytes.
            details: As the attribute.
            fingerprint: As the attribute.
        """
        assert len(layers) == spec.num_layers
        self.spec = spec
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.layers = tuple(layers)
        self.details: dict[str, Any] = dict(details or {})
        self.fingerprint = fingerprint
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._tables = tuple(tables)
        # rounded first: transformers multiplies by a tensor of the embedding's dtype
        self._multiplier = torch.tensor(spec.embedding_multiplier, dtype=self.dtype).item()

    @property
    def resident_weight_bytes(self) -> int:
        """Bytes of weights on the device; a head tied to the embedding counts once."""
        head = self._head.nbytes
        if self._head.dense_weight().data_ptr() == self._embedding.data_ptr():
            head = 0
        tables = sum(table.nbytes for table in self._tables)
        layers = sum(layer.weights.nbytes for layer in self.layers)
        return self._embedding.nbytes + layers + self._norm.nbytes + head + tables

    @property
    def linear_weight_bytes(self) -> int:
        """Bytes of the decoder layers' weights on the device."""
        return sum(layer.weights.nbytes for layer in self.layers)

    def forward(self, batch: ForwardBatch, kv: Sequence[Tensor], slab: LoraSlab | None = None) -> Tensor:
        """Run a packed batch through the decoder.

        Args:
            batch: T tokens of S sequences, R wanted rows.
            kv: One cache a layer, `[pages, 2, page, Hkv, D]` in the compute dtype; written in place.
            slab: Adapters; None = base only.

        Returns:
            `[R, H]`: rows `batch.logit_rows` after the final norm.
        """
        x = F.embedding(batch.token_ids, self._embedding)
        if self._multiplier != 1.0:
            x = x * self._multiplier
        residual: Tensor | None = None
        if slab is not None and batch.lora is not None:
            batch = dataclasses.replace(batch, lora=plan_tiles(batch.lora))
        for layer, cache in zip(self.layers, kv, strict=True):
            x, residual = layer.forward(x, residual, batch, cache, slab)
        assert residual is not None
        x, residual = x.index_select(0, batch.logit_rows), residual.index_select(0, batch.logit_rows)
        hidden, _ = add_rms_norm(x, residual, self._norm, self.spec.rms_eps, offset=self.spec.norm_offset)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Project to the vocabulary.

        Args:
            hidden: `[R, H]`, as from `forward`.

        Returns:
            `[R, V]` float32, final soft cap applied.
        """
        logits = self._head(hidden).float()
        if self.spec.final_softcap is not None:
            logits = torch.tanh(logits / self.spec.final_softcap) * self.spec.final_softcap
        return logits
