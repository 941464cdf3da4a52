"""Tokenizer and special tokens of a checkpoint, read one way: what ends a generation in serving ends it in training.

Imports `tokenizers`, no torch and no transformers.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers


class TokenizerFileError(ValueError):
    """A tokenizer or configuration file cannot be used; the text names the file and the way out, and no path."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What the files of a checkpoint say.

    Attributes:
        backend: The tokenizer of `tokenizer.json`, its own truncation and padding turned off.
        vocab_size: Rows of the model's logits by `config.json`; 0 = not stated.
        eos_token_ids: Ids that end a generation, each once: those of `generation_config.json`, else of `config.json`,
            and the tokenizer's own.
        bos_token_id: Begin-of-sequence token, if there is one.
        pad_token_id: Padding token, if there is one.
        digest: SHA-256 of `tokenizer.json`, hex.
    """

    backend: tokenizers.Tokenizer
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    digest: str


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read `tokenizer.json` and the special tokens that the configuration files beside it name.

    Args:
        directory: Of the checkpoint.

    Raises:
        TokenizerFileError: A file is missing or cannot be parsed.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerFileError(
            "the base has no tokenizer.json; convert its tokenizer with transformers' AutoTokenizer.save_pretrained"
        )
    data = path.read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for every parse error
        raise TokenizerFileError("tokenizer.json cannot be parsed; save it again with a current version") from error
    backend.no_truncation()
    backend.no_padding()
    settings = {**_json(directory / "special_tokens_map.json"), **_json(directory / "tokenizer_config.json")}
    config = _json(directory / "config.json")
    text = config.get("text_config")
    model = text if isinstance(text, dict) else config
    generation = _json(directory / "generation_config.json")
    ends = _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    eos = _token_id(backend, settings.get("eos_token"))
    size = model.get("vocab_size", 0)
    return TokenizerFiles(
        backend=backend,
        vocab_size=size if isinstance(size, int) else 0,
        eos_token_ids=tuple(dict.fromkeys(ends if eos is None else [*ends, eos])),
        bos_token_id=_token_id(backend, settings.get("bos_token")),
        pad_token_id=_token_id(backend, settings.get("pad_token")),
        digest=hashlib.sha256(data).hexdigest(),
    )


def _token_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None


def _ids(value: Any) -> list[int]:
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerFileError(f"{path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise TokenizerFileError(f"{path.name} must hold an object")
    return value
