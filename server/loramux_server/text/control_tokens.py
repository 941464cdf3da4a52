"""Control tokens that a caller writes into a chat: they stay text.

A chat template frames messages with special tokens such as `<|im_start|>`. Written inside of a message, the same text
would become the same token, and whoever wrote that message could end his turn and speak as the system. So special
tokens that the template writes are tokens, and those inside of messages are encoded as the characters that they are.

How: before rendering, each occurrence in a message is replaced by a short placeholder. The rendered text then shows
which special tokens are the template's own. They are given to a second copy of the tokenizer, in which every special
token has a secret name, together with the messages' own text. A chat without such text never comes here, so its ids are
those of the plain tokenizer.
"""

import bisect
import dataclasses
import functools
import json
import os.path
import re
import secrets
from collections.abc import Sequence

import tokenizers

from loramux_server.text.tokenizer import Encoding, Tokenizer, TokenizerError

# Of private use: no text that means anything has them.
_MARK = "\U000f0000"
_FIRST_NUMBER = 0x100000
_MOST = 0xFFFD


class ControlTokenError(ValueError):
    """The text of a special token inside of a message cannot be kept as text by this tokenizer."""


class ControlTokens:
    """Finds and disarms the text of special tokens in messages.

    Args:
        tokenizer: The base's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._secret = secrets.token_hex(8)
        # Random, so that none stands in a message. Whoever guesses it gets the text of a special token, no token.
        self._open = "".join(chr(ord(_MARK) + secrets.randbelow(_MOST)) for _ in range(2))
        # The unknown token frames nothing, and ordinary words become it.
        unknown = tokenizer.unknown_id
        self._control = {token: text for token, text in tokenizer.special_tokens.items() if text and token != unknown}
        self._contents = sorted(self._control.values(), key=len, reverse=True)
        if len(self._contents) > _MOST:
            raise TokenizerError(f"the tokenizer has {len(self._contents)} special tokens; at most {_MOST} are served")
        self._pattern = re.compile(_any_of(self._contents)) if self._contents else None
        self._token = {text: token for token, text in self._control.items()}
        self._number = {content: number for number, content in enumerate(self._contents)}
        self._placeholder = re.compile(f"{self._open}([{chr(_FIRST_NUMBER)}-{chr(_FIRST_NUMBER + _MOST)}])")

    def mask(self, text: str) -> str:
        """Replace the text of special tokens by placeholders; equal to `text` if there is none."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._open + chr(_FIRST_NUMBER + self._number[match[0]]), text)

    def encode(self, rendered: str, *, offsets: bool = True) -> Encoding:
        """Encode a chat that was rendered from masked messages.

        Args:
            rendered: The rendered chat, placeholders included.
            offsets: Whether to tell where ids come from; they take longer than the ids.

        Returns:
            Ids, and offsets in the rendered chat as it would be without masking.

        Raises:
            ControlTokenError: The vocabulary itself turns the text of a special token into that token.
        """
        parts = self._parts(rendered)
        text = "".join(part.sent for part in parts)
        if offsets:
            encoding = self._renamed.encode(text, add_special_tokens=False)
        else:
            (encoding,) = self._renamed.encode_batch_fast([text], add_special_tokens=False)
        ids = [self._ids.get(token, token) for token in encoding.ids]
        own = sum(part.own for part in parts)
        if sum(token in self._control for token in ids) != own:
            raise ControlTokenError(
                "a message holds the text of a special token, which this model's vocabulary cannot keep as text; "
                "leave it out"
            )
        return Encoding(ids=ids, offsets=_offsets(parts, encoding.offsets) if offsets else [])

    def _parts(self, rendered: str) -> "list[_Part]":
        """Cut the chat at the template's own special tokens, and put the messages' text back in between."""
        parts: list[_Part] = []
        done = 0
        for match in self._pattern.finditer(rendered) if self._pattern is not None else ():
            self._add_text(parts, rendered[done : match.start()])
            parts.append(_Part(sent=self._alias(self._token[match[0]]), shown=match[0], own=True))
            done = match.end()
        self._add_text(parts, rendered[done:])
        return parts

    def _add_text(self, parts: "list[_Part]", text: str) -> None:
        if text:
            plain = self._placeholder.sub(self._content_of, text)
            parts.append(_Part(sent=plain, shown=plain, own=False))

    def _content_of(self, placeholder: re.Match[str]) -> str:
        number = ord(placeholder[1]) - _FIRST_NUMBER
        return self._contents[number] if number < len(self._contents) else placeholder[0]

    def _alias(self, token: int) -> str:
        return f"{_MARK}{self._secret}t{token}{_MARK}"

    @functools.cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with secret names for special tokens; made when it is needed first."""
        data = json.loads(self._tokenizer.to_json())
        data["post_processor"] = None
        for added in data["added_tokens"]:
            if added["id"] in self._control:
                added |= {"content": self._alias(added["id"]), "normalized": False}
        return tokenizers.Tokenizer.from_str(json.dumps(data))

    @functools.cached_property
    def _ids(self) -> dict[int, int]:
        """Id in the renamed tokenizer -> id of the model, where added tokens have moved."""
        names = {self._alias(token): token for token in self._control}
        moved = {}
        for number, added in self._renamed.get_added_tokens_decoder().items():
            known = names.get(added.content)
            moved[number] = self._tokenizer.token_id(added.content) if known is None else known
        return {number: token for number, token in moved.items() if token is not None}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A run of text, or one special token of the template: what is encoded and what it stands for."""

    sent: str
    shown: str
    own: bool


def _any_of(texts: Sequence[str]) -> str:
    """A pattern of the longest of these texts, as a tree: hundreds of tokens cost no more than one that nearly fits."""
    rest = sorted(filter(None, texts))
    branches: list[str] = []
    while rest:
        group = [text for text in rest if text[0] == rest[0][0]]
        rest = rest[len(group) :]
        common = os.path.commonprefix(group)
        branches.append(re.escape(common) + _any_of([text.removeprefix(common) for text in group]))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in texts else "")


def _offsets(parts: Sequence[_Part], sent: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Turn offsets in what was encoded into offsets in what it stands for."""
    starts, shown_starts = [0], [0]
    for part in parts:
        starts.append(starts[-1] + len(part.sent))
        shown_starts.append(shown_starts[-1] + len(part.shown))

    def shown(start: int, end: int) -> tuple[int, int]:
        # A token may have taken blanks of the text beside it, so both ends are looked up.
        first = min(bisect.bisect_right(starts, start), len(parts)) - 1
        last = first if start == end else bisect.bisect_left(starts, end) - 1
        if first < 0:
            return 0, 0
        begin = shown_starts[first] + (0 if parts[first].own else start - starts[first])
        if start == end:
            return begin, begin
        return begin, shown_starts[last + 1] if parts[last].own else shown_starts[last] + end - starts[last]

    return [shown(start, end) for start, end in sent]
