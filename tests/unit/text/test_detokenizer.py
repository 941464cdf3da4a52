import pytest
from tokenizers import Regex, decoders, models
from tokenizers import Tokenizer as Backend

from loramux_server.text.detokenizer import IncrementalDetokenizer
from loramux_server.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import byte_level, pieces, word_piece

TEXTS = ["Hello world", "你好,世界", "😀🎉 ok", "  two  spaces ", "naïve coffee", "\t\n\n", "", "👩‍👩‍👧"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("build", [byte_level, pieces, lambda: pieces(strip=False)])
def test_one_token_at_a_time(text: str, build: object) -> None:
    assert callable(build)
    tokenizer = Tokenizer(build())
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode(text)
    emitted = [detokenizer.push([token]) for token in ids] + [detokenizer.flush()]
    assert "".join(emitted) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in emitted)
    assert "".join(emitted).lstrip(" ") == text.lstrip(" ") or build is not byte_level


def test_an_emoji_comes_whole_and_early() -> None:
    tokenizer = Tokenizer(pieces())
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = [3 + byte for byte in "😀你".encode()]
    assert [detokenizer.push([token]) for token in ids] == ["", "", "", "😀", "", "", "你"]
    assert detokenizer.flush() == ""


def test_flush_replaces_what_was_not_completed() -> None:
    tokenizer = Tokenizer(pieces())
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([3 + 0xE4, 3 + 0xBD]) == ""
    assert detokenizer.flush() == "\ufffd\ufffd" == tokenizer.decode([3 + 0xE4, 3 + 0xBD])


def test_invalid_bytes_do_not_wait() -> None:
    tokenizer = Tokenizer(pieces())
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([3 + 0xFF]) for _ in range(3)] == ["\ufffd"] * 3
    assert detokenizer.push([3 + 0xE4]) == ""
    assert detokenizer.push([3 + 0x41]) == "\ufffdA"


def test_special_tokens() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("<|im_start|>hi<|im_end|><tool><|用户|>é")
    hidden = IncrementalDetokenizer(tokenizer)
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert hidden.push(ids) + hidden.flush() == tokenizer.decode(ids)
    text = shown.push(ids) + shown.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|begin|><|im_start|>hi<|im_end|><tool><|用户|>")


def test_unknown_ids_are_left_out() -> None:
    for tokenizer in (Tokenizer(byte_level()), Tokenizer(pieces())):
        detokenizer = IncrementalDetokenizer(tokenizer)
        assert detokenizer.push([100_000]) == tokenizer.decode([100_000]) == ""


def test_only_the_first_space_is_stripped() -> None:
    tokenizer = Tokenizer(pieces())
    word = tokenizer.encode("the", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(word), detokenizer.push(word)] == ["the", " the"]


def test_a_decoder_of_another_kind() -> None:
    tokenizer = Tokenizer(word_piece())
    ids = tokenizer.encode("the quickly foxes 好好, the fox.") * 10
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces_of_text = [detokenizer.push([token]) for token in ids]
    assert "".join(pieces_of_text) + detokenizer.flush() == tokenizer.decode(ids)
    assert sum(bool(piece) for piece in pieces_of_text) > len(ids) // 2


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Replace(Regex("▁+"), " "),
        decoders.Sequence([decoders.Strip("a", 1, 0)]),
        None,
    ],
)
def test_decoders_without_a_path_of_their_own(decoder: decoders.Decoder | None) -> None:
    backend = Backend(models.WordLevel({"a": 0, "b</w>": 1, "▁c": 2, "▁": 3, "d": 4, "?": 5}, unk_token="?"))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer(backend)
    ids = [0, 2, 4, 1, 2, 4, 0, 1, 4, 2] * 6
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.flush() == tokenizer.decode(ids)


def test_time_is_linear_on_invalid_bytes() -> None:
    """Counted, not timed: the unknown decoder looks at a bounded window whatever the ids."""
    tokenizer = Tokenizer(word_piece())
    sizes: list[int] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, skip_special_tokens=True: sizes.append(len(ids)) or decode(ids, skip_special_tokens)  # type: ignore[method-assign,func-returns-value]
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token in tokenizer.encode("the fox") * 200:
        detokenizer.push([token])
    assert max(sizes) < 32
    assert len(sizes) <= 2 * 400
