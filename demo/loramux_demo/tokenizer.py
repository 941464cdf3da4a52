"""The demo base's tokenizer and chat template: byte-level BPE with Qwen2's pre-tokenization, trained on the corpus."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from loramux_demo.corpus import Conversation

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
SPECIAL_TOKENS = (PAD, START, END)
IGNORED = -100
"""Label of positions that carry no loss, as in transformers."""

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenization of the Qwen2 family; digits stand alone."""

_LEARNING_PATTERN = rf"[^\r\n\p{{L}}\p{{N}}](?=\p{{Lu}})|{QWEN2_PATTERN}"
"""While merges are learned, what precedes a capital letter stands alone: a name then has one spelling in tokens, after
a space, after a quote and at the start of an answer, and a small model learns it once. It does not hold for names in
lower case: what a space begins would be merged first in other words."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('Unknown role ' ~ message['role'] ~ '; use system, user or assistant') }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(conversations: Iterable[Conversation], *, vocab_size: int) -> tokenizers.Tokenizer:
    """Learn merges from the texts of conversations.

    Args:
        conversations: Texts to learn from.
        vocab_size: Most tokens, special ones included; fewer if the texts support no more merges.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(_LEARNING_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}" for messages in conversations for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _pre_tokenizer(QWEN2_PATTERN)
    return tokenizer


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def special_id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    """Id of a special token.

    Raises:
        ValueError: The tokenizer lacks it.
    """
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no token {token}; train it with train_tokenizer")
    return token_id


def save_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path, *, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def encode_conversations(
    tokenizer: tokenizers.Tokenizer, conversations: Sequence[Conversation]
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of rendered conversations.

    The ids equal those of the rendered chat template. Labels are the ids on the assistant's text and the token that
    ends it, `IGNORED` elsewhere.
    """
    start, end = special_id(tokenizer, START), special_id(tokenizer, END)
    # Special tokens split the text before BPE, so the parts between them can be encoded alone.
    texts = [f"{message['role']}\n{message['content']}" for messages in conversations for message in messages]
    newline: list[int] = tokenizer.encode("\n").ids
    header = len(tokenizer.encode("assistant\n").ids)
    encodings = iter(tokenizer.encode_batch_fast(texts))
    encoded = []
    for messages in conversations:
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            part: list[int] = next(encodings).ids
            ids += [start, *part, end, *newline]
            if message["role"] == "assistant":
                answer = part[header:]
                labels += [IGNORED] * (1 + header) + [*answer, end] + [IGNORED] * len(newline)
            else:
                labels += [IGNORED] * (2 + len(part) + len(newline))
        encoded.append((ids, labels))
    return encoded
