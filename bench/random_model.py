"""Random-weight checkpoints of real shapes, so that speed can be measured without a download.

Speed depends on shapes, formats and lengths, not on what the weights say. Written straight in the served layout
(NF4 codes and absmax as `loramux-server quantize` writes them), a 7B takes seconds instead of the minutes that a
bf16 checkpoint and its quantization would.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from loramux_base.nf4 import BLOCK_SIZE, Nf4Weight, to_tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen2-architecture model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_position: int = 32768
    tied: bool = False


SHAPES = {
    "tiny": Shape(
        hidden=256,
        intermediate=768,
        layers=4,
        heads=4,
        kv_heads=2,
        head_dim=64,
        vocab=2048,
        max_position=4096,
        tied=True,
    ),
    "qwen2.5-0.5b": Shape(
        hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, head_dim=64, vocab=151936, tied=True
    ),
    "qwen2.5-7b": Shape(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, head_dim=128, vocab=152064),
}


def write_checkpoint(directory: Path, shape: Shape, *, nf4: bool, device: torch.device, seed: int = 0) -> None:
    """Write a whole model directory.

    Args:
        directory: Made here; must not exist.
        shape: Sizes.
        nf4: Quantized layout; else bf16.
        device: Where the random numbers are drawn.
        seed: Of the weights.
    """
    directory.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device=device) * std).to(torch.bfloat16).cpu()

    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden)}
    if not shape.tied:
        tensors["lm_head.weight"] = normal(shape.vocab, shape.hidden)
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save_file(tensors, directory / "model-00000.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00000.safetensors")
    for layer in range(shape.layers):
        part: dict[str, torch.Tensor] = {}
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in _linears(shape).items():
            key = f"{prefix}{name}.weight"
            if nf4:
                part.update(_random_nf4(key, rows, columns, generator))
            else:
                part[key] = normal(rows, columns)
            if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                part[f"{prefix}{name}.bias"] = normal(rows)
        part[f"{prefix}input_layernorm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        part[f"{prefix}post_attention_layernorm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    _write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write_json(directory / "config.json", _config(shape, nf4=nf4))
    _write_json(directory / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 1})
    _write_tokenizer(directory, shape.vocab)


def write_adapter(directory: Path, shape: Shape, *, rank: int, seed: int, device: torch.device) -> None:
    """Write a PEFT LoRA directory over all linear layers, B non-zero."""
    directory.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in _linears(shape).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}."
            a = torch.randn(rank, columns, generator=generator, device=device) * columns**-0.5
            # Strong enough for its answers to be told from the base's.
            b = torch.randn(rows, rank, generator=generator, device=device) * 0.05
            tensors[prefix + "lora_A.weight"] = a.to(torch.bfloat16).cpu()
            tensors[prefix + "lora_B.weight"] = b.to(torch.bfloat16).cpu()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "random",
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rsplit(".", 1)[1] for name in _linears(shape)}),
        },
    )


def _linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Module path to (out_features, in_features)."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (query, shape.hidden),
        "self_attn.k_proj": (key, shape.hidden),
        "self_attn.v_proj": (key, shape.hidden),
        "self_attn.o_proj": (shape.hidden, query),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }


def _random_nf4(key: str, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    device = generator.device
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator, device=device)
    # NF4 levels of uniform codes have a standard deviation of about 0.6: weights come out near 0.02.
    absmax = torch.rand(rows, columns // BLOCK_SIZE, generator=generator, device=device) * 0.02 + 0.02
    return to_tensors(key, Nf4Weight(codes=codes.cpu(), absmax=absmax.cpu(), source_dtype=torch.bfloat16))


def _config(shape: Shape, *, nf4: bool) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "use_sliding_window": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if nf4:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    return config


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level tokenizer with as many tokens as the model: every id decodes to some text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Tokens in the byte-level alphabet, which is how such vocabularies spell bytes.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in alphabet:
        vocab[symbol] = len(vocab)
    number = 0
    while len(vocab) < vocab_size:
        vocab.setdefault(f"Ġ{number:x}", len(vocab))
        number += 1
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "</s>",
            "bos_token": "<s>",
            "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
