"""The decoder layer of every family, on packed tokens.

The residual stream enters as a pair: `x`, the output of the block before, and `residual`, the sum without it, so that
each addition is fused with the norm after it.
"""

import dataclasses

from torch import Tensor

from loramux_server.kernels.activation import glu
from loramux_server.kernels.attention import paged_attention
from loramux_server.kernels.batch import ForwardBatch
from loramux_server.kernels.lora import lora_linear
from loramux_server.kernels.norm import add_rms_norm, rms_norm
from loramux_server.kernels.rope import rope_and_write
from loramux_server.model.linear import Linear
from loramux_server.model.slab import LoraSlab
from loramux_server.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Weights of one decoder layer.

    Attributes:
        qkv: q, k and v along the output width.
        o: Output projection of attention.
        gate_up: gate and up along the output width.
        down: Output projection of the MLP.
        input_norm: `[H]`, before attention.
        mlp_norm: `[H]`, before the MLP (`pre_feedforward_layernorm` in gemma, else `post_attention_layernorm`).
        post_attention_norm: `[H]`, after attention (sandwich norms only).
        post_mlp_norm: `[H]`, after the MLP (sandwich norms only).
        q_norm: `[D]`, over each query head.
        k_norm: `[D]`, over each key head.
    """

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    input_norm: Tensor
    mlp_norm: Tensor
    post_attention_norm: Tensor | None
    post_mlp_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        norms = (
            self.input_norm,
            self.mlp_norm,
            self.post_attention_norm,
            self.post_mlp_norm,
            self.q_norm,
            self.k_norm,
        )
        linears = self.qkv.nbytes + self.o.nbytes + self.gate_up.nbytes + self.down.nbytes
        return linears + sum(norm.nbytes for norm in norms if norm is not None)


class DecoderLayer:
    """One layer: attention and gated MLP, each with its norms, residual addition and adapter updates."""

    def __init__(
        self, spec: ModelSpec, index: int, weights: LayerWeights, cos_sin: Tensor, *, batch_invariant: bool
    ) -> None:
        """Bind the weights.

        Args:
            spec: Flags of the model.
            index: Of the layer.
            weights: Its weights.
            cos_sin: `[max_position, 2, rotary_dim / 2]` float32 of the layer's rotary setting.
            batch_invariant: Passed to attention.
        """
        self._spec = spec
        self._index = index
        self.weights = weights
        self._cos_sin = cos_sin
        self._window = spec.layers[index].window
        self._batch_invariant = batch_invariant

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, kv: Tensor, slab: LoraSlab | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: `[T, H]`, output of the block before (the embedding in the first layer).
            residual: `[T, H]`, the residual stream without x; None in the first layer.
            batch: The packed batch.
            kv: `[pages, 2, page, Hkv, D]` of this layer; keys and values of the batch are written.
            slab: Adapters; read only where `batch.lora` is set.

        Returns:
            Output of the MLP and the residual stream without it, both `[T, H]`.
        """
        spec, weights = self._spec, self.weights
        eps, offset = spec.rms_eps, spec.norm_offset
        if residual is None:
            hidden, residual = rms_norm(x, weights.input_norm, eps, offset=offset), x
        else:
            hidden, residual = add_rms_norm(x, residual, weights.input_norm, eps, offset=offset)
        hidden = self._attention(hidden, batch, kv, slab)
        if weights.post_attention_norm is not None:
            hidden = rms_norm(hidden, weights.post_attention_norm, eps, offset=offset)
        hidden, residual = add_rms_norm(hidden, residual, weights.mlp_norm, eps, offset=offset)
        hidden = self._linear("gate_up", weights.gate_up, hidden, batch, slab)
        hidden = self._linear("down", weights.down, glu(hidden, spec.activation), batch, slab)
        if weights.post_mlp_norm is not None:
            hidden = rms_norm(hidden, weights.post_mlp_norm, eps, offset=offset)
        return hidden, residual

    def _attention(self, hidden: Tensor, batch: ForwardBatch, kv: Tensor, slab: LoraSlab | None) -> Tensor:
        spec = self._spec
        tokens, head_dim = hidden.shape[0], spec.head_dim
        qkv = self._linear("qkv", self.weights.qkv, hidden, batch, slab).view(tokens, -1, head_dim)
        q, k, v = qkv.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if self.weights.q_norm is not None and self.weights.k_norm is not None:
            q = self._head_norm(q, self.weights.q_norm)
            k = self._head_norm(k, self.weights.k_norm)
        q = rope_and_write(q, k, v, self._cos_sin, batch, kv)
        out = paged_attention(
            q,
            kv,
            batch,
            scale=spec.attention_scale,
            window=self._window,
            softcap=spec.attention_softcap,
            batch_invariant=self._batch_invariant,
        )
        return self._linear("o", self.weights.o, out.reshape(tokens, -1), batch, slab)

    def _head_norm(self, heads: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over each head of `[T, heads, D]`."""
        rows = heads.reshape(-1, heads.shape[-1])
        return rms_norm(rows, weight, self._spec.rms_eps, offset=self._spec.norm_offset).view(heads.shape)

    def _linear(self, group: str, linear: Linear, x: Tensor, batch: ForwardBatch, slab: LoraSlab | None) -> Tensor:
        if slab is None or batch.lora is None:
            return linear(x)
        return lora_linear(x, linear, slab.group(self._index, group), batch.lora)
