"""One reading of a checkpoint's special tokens for server and trainer."""

import json
from pathlib import Path

import pytest

from loramux_base.tokenizer_files import TokenizerFileError, read_tokenizer_files
from loramux_server.text.tokenizer import Tokenizer
from loramux_trainer.data.codec import Codec
from tests.support.tiny_models import make_checkpoint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base", "qwen2")


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_server_and_trainer_end_at_the_same_tokens(base: Path) -> None:
    rewrite(base / "generation_config.json", eos_token_id=[7, 9])
    ends = set(read_tokenizer_files(base).eos_token_ids)
    assert {7, 9} <= ends
    assert set(Tokenizer.from_directory(base).eos_token_ids) == Codec.from_directory(base).stop_ids == ends


def test_a_nested_text_config_falls_back_to_the_outer_end_token(base: Path) -> None:
    (base / "generation_config.json").unlink()
    rewrite(base / "config.json", text_config={"vocab_size": 512}, eos_token_id=11)
    ends = set(read_tokenizer_files(base).eos_token_ids)
    assert 11 in ends
    assert set(Tokenizer.from_directory(base).eos_token_ids) == Codec.from_directory(base).stop_ids == ends


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json", "tokenizer.json"])
def test_a_broken_file_is_named_without_its_path(base: Path, name: str) -> None:
    (base / name).write_text("{")
    with pytest.raises(TokenizerFileError, match=name) as caught:
        read_tokenizer_files(base)
    assert str(base) not in str(caught.value)
