"""Text of one sequence: whatever the engine's chunks, what comes out is the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.rpc.sequence_output import SequenceOutput
from loramux_server.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import byte_level

TOKENIZER = Tokenizer(byte_level(), vocab_size=512)
EOS = TOKENIZER.encode("<|im_end|>", False)[0]


def output(**options: object) -> SequenceOutput:
    settings = {"stop": [], "include_stop": False, "end_token_ids": frozenset({EOS}), "min_tokens": 0}
    return SequenceOutput(TOKENIZER, **{**settings, **options})  # type: ignore[arg-type]


def play(ids: list[int], cuts: list[int], **options: object) -> tuple[str, list[int], str | None, int]:
    sequence = output(**options)
    text, seen, matched = "", [], None
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        if sequence.finished or start == end:
            continue
        piece = sequence.push(ids[start:end], [])
        text, seen, matched = text + piece.text, seen + piece.token_ids, piece.matched
    if not sequence.finished:
        piece = sequence.finish()
        text, matched = text + piece.text, piece.matched
    return text, seen, matched, sequence.tokens


@given(
    st.lists(st.integers(0, 425), min_size=1, max_size=40),
    st.lists(st.integers(0, 40), max_size=5),
    st.lists(st.sampled_from(["a", "th", "e ", "é", "😀", "\ufffd", "quick"]), max_size=3),
    st.booleans(),
    st.integers(0, 5),
)
def test_chunks_change_nothing(ids: list[int], cuts: list[int], stop: list[str], include: bool, least: int) -> None:
    ids = [token for token in ids if token != EOS]
    options = {"stop": stop, "include_stop": include, "min_tokens": least}
    whole = play(ids, [], **options)
    assert play(ids, cuts, **options) == whole
    assert play(ids, list(range(len(ids))), **options) == whole
    text, seen, matched, count = whole
    assert seen == ids[:count] and len(seen) == count
    if not stop:
        assert text == TOKENIZER.decode(ids) and matched is None


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    half = [next(i for i in range(256) if TOKENIZER.id_to_token(i) == "ð")]
    assert play(half, []) == ("\ufffd", half, None, 1)
    assert play(half, [], stop=["x"]) == ("\ufffd", half, None, 1)
    assert play([*half, EOS], []) == ("\ufffd", [*half, EOS], None, 2)


def test_nothing_may_follow_the_end() -> None:
    sequence = output()
    sequence.finish()
    with pytest.raises(AssertionError):
        sequence.push([1], [])
