"""Bytes that a token id stands for, for log-probabilities: exact also for tokens that hold a part of a character."""

from collections.abc import Callable

from loramux_server.text.detokenizer import IncrementalDetokenizer
from loramux_server.text.tokenizer import Tokenizer


def token_bytes_of(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Return a function from token id to bytes; ids without text give no bytes.

    Args:
        tokenizer: Of the served model. Its cache of pieces is filled by decoding.
    """
    cache: dict[int, bytes] = {}

    def token_bytes(token_id: int) -> bytes:
        known = cache.get(token_id)
        if known is None:
            known = cache[token_id] = _bytes(tokenizer, token_id)
        return known

    return token_bytes


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    # Twice, since the first token of a text may decode in another way and is not cached then.
    detokenizer.push([token_id])
    detokenizer.push([token_id])
    piece = tokenizer.pieces.get(token_id)
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, int):
        return bytes([piece])
    if isinstance(piece, str):
        return piece.encode()
    return tokenizer.decode([token_id], skip_special_tokens=False).encode()
