from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_server.text.tokenizer import Tokenizer, TokenizerError
from tests.support.tiny_tokenizers import byte_level, pieces, write_tokenizer

TEXTS = ["Hello world", " 你好 😀", "<|im_start|>user\nhi<|im_end|>", "", "a  b\n"]
NAMES = {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
    ],
)
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(tmp_path: Path, flags: dict[str, Any], text: str) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    directory = write_tokenizer(tmp_path, byte_level(), tokenizer_config={**config, **flags})
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory)
    for special in (True, False):
        assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special)
    ids = theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_many() -> None:
    tokenizer = Tokenizer(pieces())
    assert tokenizer.encode_many(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_ends_vocabulary_and_begin(tmp_path: Path) -> None:
    backend = byte_level()
    end, start = backend.token_to_id("<|im_end|>"), backend.token_to_id("<|im_start|>")
    cases: list[tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = [
        ({"vocab_size": 500, "eos_token_id": start}, {"eos_token_id": [5, 6]}, (5, 6, end)),
        ({"vocab_size": 500, "eos_token_id": start}, {}, (start, end)),
        ({"text_config": {"vocab_size": 500, "eos_token_id": end}}, {"eos_token_id": None}, (end,)),
    ]
    for number, (config, generation, ends) in enumerate(cases):
        tokenizer = Tokenizer.from_directory(
            write_tokenizer(
                tmp_path / str(number), backend, config=config, generation_config=generation, tokenizer_config=NAMES
            )
        )
        assert tokenizer.eos_token_ids == ends
        assert tokenizer.vocab_size == 500
        assert tokenizer.bos_token_id == backend.token_to_id("<|begin|>")
    bare = Tokenizer.from_directory(write_tokenizer(tmp_path / "bare", backend))
    assert bare.vocab_size == backend.get_vocab_size()
    assert (bare.eos_token_ids, bare.bos_token_id) == ((), None)
    assert len(bare.digest) == 64


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    write_tokenizer(tmp_path, backend)
    assert Tokenizer.from_directory(tmp_path).encode("Hello world " * 3) == Tokenizer(byte_level()).encode(
        "Hello world " * 3
    )


@pytest.mark.parametrize(("name", "data"), [("tokenizer", "{}"), ("config", "["), ("generation_config", "[]")])
def test_broken_files_are_named(tmp_path: Path, name: str, data: str) -> None:
    write_tokenizer(tmp_path, byte_level())
    (tmp_path / f"{name}.json").write_text(data)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_directory(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
