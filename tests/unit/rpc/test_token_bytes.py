"""Bytes of single tokens, also where they hold a part of a character."""

from loramux_server.rpc.token_bytes import token_bytes_of
from loramux_server.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import byte_level, pieces


def test_bytes_of_a_text_add_up_to_it() -> None:
    text = " naïve 😀 你好 fox"
    for backend in (byte_level(), pieces(strip=False)):
        tokenizer = Tokenizer(backend)
        token_bytes = token_bytes_of(tokenizer)
        ids = tokenizer.encode(text, False)
        joined = b"".join(token_bytes(token) for token in ids).decode()
        assert joined.strip() == text.strip()
        assert token_bytes(ids[0]) == token_bytes(ids[0])


def test_special_and_unknown_ids() -> None:
    tokenizer = Tokenizer(byte_level(), vocab_size=512)
    token_bytes = token_bytes_of(tokenizer)
    assert token_bytes(tokenizer.encode("<|im_end|>", False)[0]) == b"<|im_end|>"
    assert token_bytes(511) == b""
