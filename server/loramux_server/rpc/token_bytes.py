"""Bytes that a token id stands for, for log-probabilities: exact also for tokens that hold a part of a character."""

from collections.abc import Callable

from loramux_server.text.detokenizer import IncrementalDetokenizer
from loramux_server.text.tokenizer import Tokenizer


def token_bytes_of(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """Return a function from token id to bytes; ids without text give no bytes.

    Args:
        tokenizer: Of the served model.
    """
    return IncrementalDetokenizer(tokenizer, skip_special_tokens=False).token_bytes
