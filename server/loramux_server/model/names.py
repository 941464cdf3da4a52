"""Parameter names of a checkpoint, as transformers writes them."""

import dataclasses

from loramux_server.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """Names of one decoder layer; modules of a fused group in the order of their columns.

    Attributes:
        spec: Flags of the model.
        index: Of the layer.
    """

    spec: ModelSpec
    index: int

    def _in_layer(self, *names: str) -> tuple[str, ...]:
        return tuple(f"model.layers.{self.index}.{name}" for name in names)

    @property
    def qkv(self) -> tuple[str, ...]:
        """Modules of the q|k|v product."""
        if self.spec.fused_names:
            return self._in_layer("self_attn.qkv_proj")
        return self._in_layer("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

    @property
    def o(self) -> tuple[str, ...]:
        """The output projection of attention."""
        return self._in_layer("self_attn.o_proj")

    @property
    def gate_up(self) -> tuple[str, ...]:
        """Modules of the gate|up product."""
        if self.spec.fused_names:
            return self._in_layer("mlp.gate_up_proj")
        return self._in_layer("mlp.gate_proj", "mlp.up_proj")

    @property
    def down(self) -> tuple[str, ...]:
        """The output projection of the MLP."""
        return self._in_layer("mlp.down_proj")

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear modules of the layer."""
        return self.qkv + self.o + self.gate_up + self.down

    @property
    def input_norm(self) -> str:
        """Norm before attention."""
        return self._in_layer("input_layernorm.weight")[0]

    @property
    def mlp_norm(self) -> str:
        """Norm before the MLP."""
        name = "pre_feedforward_layernorm" if self.spec.sandwich_norms else "post_attention_layernorm"
        return self._in_layer(f"{name}.weight")[0]

    @property
    def post_attention_norm(self) -> str:
        """Norm of attention's output (sandwich norms)."""
        return self._in_layer("post_attention_layernorm.weight")[0]

    @property
    def post_mlp_norm(self) -> str:
        """Norm of the MLP's output (sandwich norms)."""
        return self._in_layer("post_feedforward_layernorm.weight")[0]

    @property
    def q_norm(self) -> str:
        """Norm over query heads."""
        return self._in_layer("self_attn.q_norm.weight")[0]

    @property
    def k_norm(self) -> str:
        """Norm over key heads."""
        return self._in_layer("self_attn.k_norm.weight")[0]


def linear_weights(spec: ModelSpec) -> tuple[str, ...]:
    """Parameter names of all decoder linears: what NF4 quantizes."""
    return tuple(
        f"{module}.weight" for index in range(spec.num_layers) for module in LayerNames(spec=spec, index=index).linears
    )
