"""Incremental detokenization: text as early as it is certain, in linear time.

The decoder of `tokenizer.json` decides how:

- byte-level BPE (GPT-2, Qwen, Llama 3): every token is bytes; at most 3 wait for the rest of their character.
- SentencePiece pieces (Llama 2, Mistral, Gemma): a token is text or, by byte fallback, one byte; at most 3 bytes wait.
- anything else: the library decodes a short window twice, and the difference is the new text.

The concatenation of everything pushed and flushed equals `Tokenizer.decode` of all ids, with one exception: where a run
of byte-fallback tokens is not valid UTF-8, the library replaces every byte of the whole run, characters that were
complete among them; these are kept here, since they were sent already, and only the bytes that belong to none become
U+FFFD.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from loramux_server.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>", re.ASCII)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

# What may follow the stages that work on one token: Strip works on the whole text only after Fuse.
_TAILS = frozenset(
    {(), ("Fuse",), ("ByteFallback",), ("ByteFallback", "Fuse"), ("ByteFallback", "Fuse", "Strip"), ("Fuse", "Strip")}
)


class _Decoder(Protocol):
    def push(self, ids: Iterable[int]) -> str: ...

    def flush(self) -> str: ...

    def bytes_of(self, token_id: int) -> bytes: ...


class IncrementalDetokenizer:
    """Turns one sequence's ids into text as they come.

    Args:
        tokenizer: The base's tokenizer.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = _decoder_for(tokenizer, skip_special_tokens)

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids; returns the text that is certain now."""
        return self._decoder.push(token for token in ids if token not in self._skipped)

    def flush(self) -> str:
        """Text of what still waits, once no more ids follow: U+FFFD for a character that was not completed."""
        return self._decoder.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one id stands for inside of a text, maybe a part of a character; none for an unknown id.

        Special tokens have those of their own text. Touches nothing that was pushed.
        """
        return self._decoder.bytes_of(token_id)


def _decoder_for(tokenizer: Tokenizer, skip_special_tokens: bool) -> _Decoder:
    stages = _stages(tokenizer.decoder_config)
    kinds = tuple(stage.get("type") for stage in stages)
    if kinds == ("ByteLevel",):
        return _ByteLevel(tokenizer)
    split = next((index for index, kind in enumerate(kinds) if kind not in ("Replace", "Metaspace")), len(kinds))
    rules = [rule for rule in map(_rule, stages[:split]) if rule is not None]
    strip = stages[-1] if kinds[-1:] == ("Strip",) else None
    if kinds and len(rules) == split and kinds[split:] in _TAILS and (strip is None or strip["stop"] == 0):
        return _Pieces(tokenizer, rules, "ByteFallback" in kinds, strip)
    return _Window(tokenizer, skip_special_tokens)


def _stages(config: dict[str, Any] | None) -> list[dict[str, Any]]:
    if config is None:
        return []
    if config.get("type") == "Sequence":
        return [inner for stage in config["decoders"] for inner in _stages(stage)]
    return [config]


_Rule = Callable[[str, bool], str]


def _rule(stage: dict[str, Any]) -> _Rule | None:
    """A function of (token, is the first token); None for what is not known here."""
    if stage["type"] == "Metaspace":
        mark = stage["replacement"]
        scheme = stage.get("prepend_scheme", "always" if stage.get("add_prefix_space", True) else "never")
        drop = scheme != "never"
        return lambda token, first: token.replace(mark, "" if first and drop else " ")
    pattern, content = stage["pattern"].get("String"), stage["content"]
    if not pattern:
        return None
    return lambda token, first: token.replace(pattern, content)


class _ByteLevel:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = tokenizer.pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(self.bytes_of(token) for token in ids))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def bytes_of(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if not isinstance(piece, bytes):
            token = self._tokenizer.id_to_token(token_id) or ""
            # A token with a character outside of the alphabet, such as an added one, stands for its own text.
            known = all(char in _BYTE_OF for char in token)
            piece = bytes(_BYTE_OF[char] for char in token) if known else token.encode()
            self._pieces[token_id] = piece
        return piece


class _Pieces:
    def __init__(
        self, tokenizer: Tokenizer, rules: Sequence[_Rule], byte_fallback: bool, strip: dict[str, Any] | None
    ) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._byte_fallback = byte_fallback
        self._pieces = tokenizer.pieces
        self._pending = bytearray()
        self._first = True
        self._strip_char = strip["content"] if strip else ""
        self._strip_left = int(strip["start"]) if strip else 0

    def push(self, ids: Iterable[int]) -> str:
        parts: list[str] = []
        for token_id in ids:
            piece = self._piece(token_id)
            if piece is None:
                continue
            if isinstance(piece, int):
                self._take_byte(piece, parts)
            else:
                self._give_up(parts)
                parts.append(piece)
        return self._strip("".join(parts))

    def flush(self) -> str:
        parts: list[str] = []
        self._give_up(parts)
        return self._strip("".join(parts))

    def bytes_of(self, token_id: int) -> bytes:
        piece = self._inner(token_id)
        if isinstance(piece, int):
            return bytes([piece])
        return b"" if piece is None else piece.encode()

    def _piece(self, token_id: int) -> str | int | None:
        """Text of a token, or its byte, or None for an id without a token."""
        if not self._first:
            return self._inner(token_id)
        found = self._read(token_id, first=True)
        self._first = found is None
        return found

    def _inner(self, token_id: int) -> str | int | None:
        """The same for a token that is not the first."""
        piece = self._pieces.get(token_id, b"")
        if not isinstance(piece, bytes):
            return piece
        found = self._read(token_id, first=False)
        if found is not None:
            self._pieces[token_id] = found
        return found

    def _read(self, token_id: int, *, first: bool) -> str | int | None:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        for rule in self._rules:
            token = rule(token, first)
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return int(match[1], 16) if match else token

    def _take_byte(self, byte: int, parts: list[str]) -> None:
        self._pending.append(byte)
        try:
            parts.append(self._pending.decode())
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return
            # The last byte cannot belong to what waits: that becomes U+FFFD, the byte may begin a character.
            del self._pending[-1]
            if self._pending:
                self._give_up(parts)
                self._take_byte(byte, parts)
            else:
                parts.append(_REPLACEMENT)
        else:
            self._pending.clear()

    def _give_up(self, parts: list[str]) -> None:
        parts.append(_REPLACEMENT * len(self._pending))
        self._pending.clear()

    def _strip(self, text: str) -> str:
        """Drop up to `start` leading characters of the whole text."""
        while self._strip_left and text:
            if text[0] != self._strip_char:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class _Window:
    """Difference of two decodes over a few ids: what the text before does not change any more."""

    _CONTEXT = 8
    _LONGEST_WAIT = 8

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._read = 0

    def push(self, ids: Iterable[int]) -> str:
        return "".join(self._push_one(token) for token in ids)

    def flush(self) -> str:
        return self._difference(self._decode(self._ids))

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        waits = len(self._ids) - self._read
        if text.endswith(_REPLACEMENT) and waits < self._LONGEST_WAIT:
            return ""
        emit = self._difference(text)
        if not emit and waits < self._LONGEST_WAIT:
            return ""
        self._read = len(self._ids)
        if self._read > 2 * self._CONTEXT:
            del self._ids[: self._read - self._CONTEXT]
            self._read = self._CONTEXT
        return emit

    def _difference(self, text: str) -> str:
        # Equal to what follows the text before wherever the decoder leaves that alone; it was sent already.
        return text[len(self._decode(self._ids[: self._read])) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
