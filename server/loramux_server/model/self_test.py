"""Start-up check: a small random model with the checkpoint's flags, our layers against transformers' modules."""

from typing import Any

import torch

from loramux_server.model.load import assemble
from loramux_server.model.names import LayerNames
from loramux_server.model.packing import Chunk, PagedSequences
from loramux_server.model.reference import reference_module
from loramux_server.model.spec import ModelSpec
from loramux_server.model.weights import TensorSource

TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.006, torch.bfloat16: 0.04}
"""Largest accepted root mean square difference of logits, in units of their standard deviation, by compute dtype.

Rounding alone gave at most 8e-7, 0.0023 and 0.019 over the families and four seeds each on the CPU; a wrong flag gives
0.05 or more in float32."""

_LENGTHS = (41, 7)
_MAX_WINDOW = 16
_VOCABULARY = 128
_INTERMEDIATE = 128


class SelfTestError(RuntimeError):
    """The fused layers do not compute what transformers computes for this checkpoint's flags."""


def shrink_config(spec: ModelSpec) -> dict[str, Any]:
    """The checkpoint's config with two layers and small widths; flags and head size stay.

    The two layers are the first and the first of another kind, if there is one; sliding windows are shortened, so that
    the test's sequences are longer.
    """
    config = dict(spec.config)
    heads = 2 * min(spec.num_heads // spec.num_kv_heads, 4)
    second = next((i for i, layer in enumerate(spec.layers) if layer != spec.layers[0]), 1)
    config.update(
        vocab_size=_VOCABULARY,
        hidden_size=32 * heads,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=spec.head_dim,
        max_window_layers=0,
    )
    config.update(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if config.get("sliding_window"):
        config["sliding_window"] = min(config["sliding_window"], _MAX_WINDOW)
    if config.get("layer_types"):
        types = config["layer_types"]
        config["layer_types"] = [types[0], types[min(second, len(types) - 1)]]
    elif spec.family.startswith("gemma"):
        config["layer_types"] = ["sliding_attention", "full_attention"]
    if "max_window_layers" not in spec.config:
        del config["max_window_layers"]
    return config


@torch.no_grad()
def self_test(spec: ModelSpec, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> float:
    """Run it: two sequences, a prompt in chunks mixed with decode steps, every token's logits compared.

    Args:
        spec: Flags of the checkpoint to be served.
        device: Where the checkpoint will run; the reference always runs there in float32.
        dtype: Compute dtype of our layers.
        seed: Of weights and tokens.

    Returns:
        Root mean square difference of the logits in units of their standard deviation.

    Raises:
        SelfTestError: It exceeds the dtype's tolerance, or logits are not finite.
    """
    small = ModelSpec.from_config(shrink_config(spec))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.to(dtype).float() for name, tensor in _random_weights(small, generator).items()}
    source = TensorSource(weights)
    length = max(_LENGTHS)
    ours = assemble(small, source, dtype=dtype, device=device, max_positions=length)
    reference = reference_module(small, source, dtype=torch.float32, device=device)
    sequences = [torch.randint(_VOCABULARY, (n,), generator=generator).tolist() for n in _LENGTHS]
    cache = PagedSequences(small, sequences=len(sequences), length=length, dtype=dtype, device=device)
    first, second = sequences
    steps = [
        [Chunk(sequence=1, start=0, token_ids=second[:5]), Chunk(sequence=0, start=0, token_ids=first[:19])],
        [Chunk(sequence=1, start=5, token_ids=second[5:6]), Chunk(sequence=0, start=19, token_ids=first[19:40])],
        [Chunk(sequence=0, start=40, token_ids=first[40:]), Chunk(sequence=1, start=6, token_ids=second[6:])],
    ]
    expected = [reference(input_ids=torch.tensor([ids], device=device)).logits[0].float() for ids in sequences]
    differences = []
    for step in steps:
        logits = ours.logits(ours.forward(cache.pack(step), cache.kv))
        wanted = [expected[chunk.sequence][chunk.start : chunk.start + len(chunk.token_ids)] for chunk in step]
        differences.append(logits - torch.cat(wanted))
    result = (torch.cat(differences).square().mean().sqrt() / torch.cat(expected).std()).item()
    if not result <= TOLERANCE[dtype]:  # NaN is not
        raise SelfTestError(
            f"the fused layers differ from transformers by {result:.3g} standard deviations of the logits "
            f"({spec.family}, {dtype}, {device}; accepted: {TOLERANCE[dtype]:g}); do not serve this model with these "
            "versions of torch and transformers, or switch the self-test off at your own risk"
        )
    return result


def _random_weights(spec: ModelSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights whose logits depend on every flag: wide linears, norms off their neutral value, biases not zero."""
    weights: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int, scale: float, centre: float = 0.0) -> None:
        weights[name] = centre + scale * torch.randn(shape, generator=generator)

    hidden, inner = spec.hidden_size, spec.num_heads * spec.head_dim
    outer, wide = spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    centre = 1.0 - spec.norm_offset
    draw("model.embed_tokens.weight", spec.vocab_size, hidden, scale=0.25)
    draw("model.norm.weight", hidden, scale=0.1, centre=centre)
    if not spec.tied_embeddings:
        draw("lm_head.weight", spec.vocab_size, hidden, scale=0.25)
    for index in range(spec.num_layers):
        names = LayerNames(spec=spec, index=index)
        rows = {
            names.qkv: ((inner, outer, outer), hidden, spec.qkv_bias),
            names.o: ((hidden,), inner, spec.output_bias),
            names.gate_up: ((wide, wide), hidden, spec.mlp_bias),
            names.down: ((hidden,), wide, spec.mlp_bias),
        }
        for modules, (sizes, width, bias) in rows.items():
            for module, size in zip(modules, sizes if len(modules) > 1 else (sum(sizes),), strict=True):
                draw(f"{module}.weight", size, width, scale=1.5 * width**-0.5)
                if bias:
                    draw(f"{module}.bias", size, scale=0.2)
        draw(names.input_norm, hidden, scale=0.1, centre=centre)
        draw(names.mlp_norm, hidden, scale=0.1, centre=centre)
        if spec.sandwich_norms:
            draw(names.post_attention_norm, hidden, scale=0.1, centre=centre)
            draw(names.post_mlp_norm, hidden, scale=0.1, centre=centre)
        if spec.qk_norm:
            draw(names.q_norm, spec.head_dim, scale=0.1, centre=centre)
            draw(names.k_norm, spec.head_dim, scale=0.1, centre=centre)
    return weights
