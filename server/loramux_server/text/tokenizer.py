"""The base's tokenizer, over `tokenizers` alone (no transformers, no torch)."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from loramux_base.tokenizer_files import TokenizerFileError, read_tokenizer_files


class TokenizerError(ValueError):
    """The checkpoint's tokenizer files cannot be used; the text names the file and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Ids of a text and where they come from.

    Attributes:
        ids: Token ids.
        offsets: For each id the first code point that it covers and one past the last; equal for ids that the
            tokenizer added. Tokens that share a character cover it all of them.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """Text to ids and back, equal to the checkpoint's tokenizer in transformers.

    Encoding releases the GIL, but takes time linear in the text: the caller bounds the bytes first and calls from a
    thread for long texts.

    Args:
        backend: The tokenizer; truncation and padding that it carries are turned off.
        vocab_size: Rows of the model's logits; 0 = as many as the tokenizer has tokens.
        eos_token_ids: Ids that end a generation.
        bos_token_id: Id of the begin-of-sequence token, if there is one.
        digest: SHA-256 of `tokenizer.json`, hex.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        vocab_size: int = 0,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        digest: str = "",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = vocab_size or backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = bos_token_id
        self.digest = digest

    @classmethod
    def from_directory(cls, directory: Path | str) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json`, `config.json` and `generation_config.json`.

        Raises:
            TokenizerError: A file is missing or cannot be parsed.
        """
        try:
            files = read_tokenizer_files(Path(directory))
        except TokenizerFileError as error:
            raise TokenizerError(str(error)) from error
        return cls(
            files.backend,
            vocab_size=files.vocab_size,
            eos_token_ids=files.eos_token_ids,
            bos_token_id=files.bos_token_id,
            digest=files.digest,
        )

    @functools.cached_property
    def special_tokens(self) -> dict[int, str]:
        """Special tokens by id, as they are written in a text."""
        added = self._backend.get_added_tokens_decoder()
        return {key: token.content for key, token in added.items() if token.special}

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens: left out of text unless asked for."""
        return frozenset(self.special_tokens)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary cannot write; None if it can write everything."""
        model = self._backend.model
        if hasattr(model, "unk_token"):
            return None if model.unk_token is None else self.token_id(model.unk_token)
        number = json.loads(self.to_json())["model"].get("unk_id")
        return number if isinstance(number, int) else None

    @functools.cached_property
    def decoder_config(self) -> dict[str, Any] | None:
        """The decoder as in `tokenizer.json`; None if there is none."""
        decoder = self._backend.decoder
        if decoder is None:
            return None
        config: dict[str, Any] = json.loads(decoder.__getstate__())
        return config

    @functools.cached_property
    def pieces(self) -> dict[int, bytes | str | int]:
        """Cache of the detokenizer: what an id decodes to."""
        return {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text.

        Args:
            text: The text; special tokens written in it become their ids, see `control_tokens` for chats.
            add_special_tokens: Put around the text what the post-processor of `tokenizer.json` says; False for
                rendered chats, whose template writes them. `add_bos_token` in `tokenizer_config.json` counts for
                nothing beside that file, as in transformers.
        """
        return self.encode_many([text], add_special_tokens)[0]

    def encode_many(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, computed in parallel where the library may."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Ids of a text as `encode` gives them, with the part of the text that each one covers."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return Encoding(ids=encoding.ids, offsets=encoding.offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids that the tokenizer does not know are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None if there is none."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary writes it; None if there is none."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The tokenizer as in `tokenizer.json`, without truncation and padding."""
        return self._backend.to_str()
