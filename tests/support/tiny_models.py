"""Tiny random checkpoints, adapters and a tokenizer, all made in code: complete model directories without a download.

Weights are drawn wide enough that logits differ clearly between tokens, prompts and adapters; norms and biases are
not at their neutral values, so that a forgotten bias or a wrong norm offset shows.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3")
"""Families that `make_checkpoint` builds."""

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven decoder linears, the usual `target_modules`."""

EOS = "<|im_end|>"
PAD = "<|endoftext|>"
_SPECIAL = (PAD, "<|im_start|>", EOS)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, as Qwen uses it."""

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A small model answers questions about orders and invoices.",
    "Hello, how can I help you today? Please give me the number of your order and the name on the account.",
    "def main(argument: str) -> int: return 0  # a comment about the code and the tests of the server",
    '{"name": "value", "items": [1, 2, 3], "ok": true} Grüße aus Köln, café, naïve, 你好世界, Привет мир',
)

_SMALL: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral": {"sliding_window": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gemma2": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
    },
    "gemma3": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        },
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
}


def make_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """Byte-level BPE whose ids stay below `vocab_size`: three ChatML specials, 256 bytes, merges of a short corpus.

    Args:
        vocab_size: Upper bound of the number of tokens; at least 259.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in _SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def make_config(
    family: str = "qwen2",
    *,
    vocab_size: int = 512,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_position: int = 2048,
    **overrides: Any,
) -> PretrainedConfig:
    """A small `transformers` config of the family.

    Args:
        family: One of `FAMILIES`.
        vocab_size: Rows of the embedding.
        hidden: Width; a multiple of 64 keeps NF4 blocks inside one row.
        layers: Decoder layers; models with layer types alternate sliding and full attention.
        heads: Query heads; head size is `hidden // heads`.
        kv_heads: Key and value heads.
        max_position: Longest sequence.
        **overrides: Any field of the family's config.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position,
        "bos_token_id": None,
        "eos_token_id": _SPECIAL.index(EOS),
        "pad_token_id": _SPECIAL.index(PAD),
    }
    if family != "phi3":
        fields["head_dim"] = hidden // heads
    if family in ("gemma2", "gemma3"):
        fields["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    fields |= _SMALL[family]
    fields |= overrides
    return AutoConfig.for_model("gemma3_text" if family == "gemma3" else family, **fields)


def make_model(config: PretrainedConfig, *, seed: int = 0, dtype: str = "float32") -> PreTrainedModel:
    """A `transformers` model of the config with wide random weights, in eval mode.

    Args:
        config: As from `make_config`.
        seed: Of the weights.
        dtype: Name of a torch dtype; weights are drawn in float32, then cast.
    """
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    centre = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(centre + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(0.15 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()


def make_checkpoint(
    directory: str | Path,
    family: str = "qwen2",
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_position: int = 2048,
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    """Write a complete model directory: config, safetensors, tokenizer with chat template, generation config.

    Args:
        directory: Created if missing.
        family: One of `FAMILIES`.
        seed: Of the weights.
        vocab_size: As in `make_config`.
        hidden: As in `make_config`.
        layers: As in `make_config`.
        heads: As in `make_config`.
        kv_heads: As in `make_config`.
        max_position: As in `make_config`.
        dtype: Of the stored weights.
        **overrides: As in `make_config`.

    Returns:
        The directory.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = make_config(
        family,
        vocab_size=vocab_size,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        max_position=max_position,
        **overrides,
    )
    make_model(config, seed=seed, dtype=dtype).save_pretrained(path)
    make_tokenizer(vocab_size).save(str(path / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": ["<|im_start|>", EOS],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_position,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")
    return path


def make_adapter(
    directory: str | Path,
    checkpoint: str | Path,
    *,
    rank: int = 8,
    alpha: int = 16,
    seed: int = 0,
    target_modules: Sequence[str] = ALL_LINEAR,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    scale: float = 0.2,
    dtype: str = "float32",
) -> Path:
    """Write an adapter directory the way PEFT does (`get_peft_model`, `save_pretrained`), with B drawn at random.

    Args:
        directory: Created if missing.
        checkpoint: Base model directory.
        rank: r.
        alpha: lora_alpha.
        seed: Of A and B.
        target_modules: Names of the linears with an adapter.
        use_rslora: Scale by alpha / sqrt(r).
        rank_pattern: Per-module rank, as in PEFT.
        alpha_pattern: Per-module alpha, as in PEFT.
        scale: Standard deviation of B; A has 1 / sqrt(in_features).
        dtype: Of the stored tensors.

    Returns:
        The directory.
    """
    path = Path(directory)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(target_modules),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
    )
    with warnings.catch_warnings():  # PEFT reads an attribute that newer transformers releases renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = get_peft_model(base, adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                deviation = scale if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
                parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(str(path), safe_serialization=True)
    return path
