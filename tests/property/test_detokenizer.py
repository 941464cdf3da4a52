"""Whatever the ids and however they are cut: the pieces add up to what the library decodes."""

import codecs
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.text.detokenizer import IncrementalDetokenizer, _byte_alphabet
from loramux_server.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import byte_level, pieces, word_piece

TOKENIZERS = {
    "byte-level": Tokenizer(byte_level()),
    "strip": Tokenizer(pieces()),
    "gemma": Tokenizer(pieces(strip=False)),
    "metaspace": Tokenizer(pieces(strip=False, metaspace=True)),
    "word-piece": Tokenizer(word_piece()),
}


def pushed(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    texts = [detokenizer.push(ids[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    return [*texts, detokenizer.flush()]


BACKEND = byte_level()
BYTE_LEVEL_IDS = {byte: BACKEND.token_to_id(char) for char, byte in _byte_alphabet().items()}
STAND_IN = pieces().token_to_id("\ue000")

IDS = st.lists(st.integers(0, 460), max_size=40)
CUTS = st.lists(st.integers(0, 40), max_size=12)


@settings(max_examples=300, deadline=None)
@given(ids=IDS, cuts=CUTS, skip=st.booleans())
@pytest.mark.parametrize("name", ["byte-level", "word-piece"])
def test_random_ids(name: str, ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    if name == "word-piece":
        ids = [token % 18 for token in ids]
    assert "".join(pushed(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip)


def a_replacement_for_every_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("tests.every-byte", a_replacement_for_every_byte)


@settings(max_examples=300, deadline=None)
@given(ids=IDS, cuts=CUTS, skip=st.booleans())
@pytest.mark.parametrize("name", ["strip", "gemma", "metaspace"])
def test_random_pieces(name: str, ids: list[int], cuts: list[int], skip: bool) -> None:
    """Equal to the library, but for runs of byte tokens that are not UTF-8: there complete characters stay."""
    tokenizer = TOKENIZERS[name]
    ids = [token for token in ids if token != STAND_IN]
    ours = "".join(pushed(tokenizer, ids, cuts, skip))
    shown = [token for token in ids if tokenizer.id_to_token(token) and not (skip and token < 3)]
    groups = [(is_byte, list(group)) for is_byte, group in itertools.groupby(shown, lambda token: 3 <= token < 259)]
    runs = [bytes(token - 3 for token in group) for is_byte, group in groups if is_byte]
    # The library decodes the rest, with a stand-in for every run.
    others = [token for is_byte, group in groups for token in ([STAND_IN] if is_byte else group)]
    texts = tokenizer.decode(others, skip).split("\ue000")
    decoded = [run.decode(errors="tests.every-byte") for run in runs]
    if name == "strip" and groups and groups[0][0]:
        decoded[0] = decoded[0].removeprefix(" ")
    assert ours == "".join(map("".join, itertools.zip_longest(texts, decoded, fillvalue="")))
    if all("\ufffd" not in text for text in decoded):
        assert ours == tokenizer.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), cuts=CUTS)
@pytest.mark.parametrize("name", list(TOKENIZERS)[:4])
def test_text_of_any_script_comes_through(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pushed(tokenizer, ids, cuts, False)) == tokenizer.decode(ids, False)


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=24), st.text(max_size=8).map(lambda text: text.encode()[:-1])))
@pytest.mark.parametrize("name", ["byte-level", "gemma"])
def test_no_more_than_three_bytes_wait(name: str, data: bytes) -> None:
    tokenizer = TOKENIZERS[name]
    detokenizer = IncrementalDetokenizer(tokenizer)
    errors = "replace" if name == "byte-level" else "tests.every-byte"
    text = ""
    for count, byte in enumerate(data, 1):
        text += detokenizer.push([BYTE_LEVEL_IDS[byte] if name == "byte-level" else 3 + byte])
        assert text in [data[: count - waiting].decode(errors=errors) for waiting in range(4) if waiting <= count]
    text += detokenizer.flush()
    assert text == data.decode(errors=errors)
