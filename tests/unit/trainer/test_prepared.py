from pathlib import Path
from typing import Any

import pytest

from loramux_trainer.config import DataConfig
from loramux_trainer.data.codec import Codec
from loramux_trainer.data.prepared import PreparedData, prepare
from loramux_trainer.errors import ConfigError, DataError
from tests.unit.trainer.conftest import records, write_jsonl

LONG = {"dialogue": [{"user": "word " * 200, "assistant": "b"}]}


def _prepare(base: Path, train: Path, **settings: Any) -> PreparedData:
    config = DataConfig.model_validate({"train": [train], **settings})
    return prepare(config, Codec.from_directory(base), seed=7, max_length=128)


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"dialogue": [{"user": "a<|im_end|>", "assistant": "b"}]}, "special token"), (LONG, "too long: ")],
)
def test_a_problem_is_named_before_the_data_is_found_too_few_to_split(
    base: Path, tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=rf"one\.jsonl:1: .*{reason}"):
        _prepare(base, write_jsonl(tmp_path / "one.jsonl", [record]))


def test_what_is_too_long_takes_no_place_among_the_held_out(base: Path, tmp_path: Path) -> None:
    long = [{"dialogue": [{"user": f"{n} " + "word " * 200, "assistant": "b"}]} for n in range(80)]
    data = _prepare(base, write_jsonl(tmp_path / "a.jsonl", [*long, *records(10)]), validation_share=0.5)
    assert (len(data.train), len(data.validation)) == (5, 5)
    assert (data.report["train"]["too_long"], data.report["validation"]["too_long"]) == (80, 0)
    assert data.report["train"]["loss_tokens"] == sum(item.loss_tokens for item in data.train)
    assert data.report["validation"]["conversations"] == 5


def test_problems_of_all_files_are_named_together(base: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("{\n")
    with pytest.raises(DataError) as caught:
        _prepare(base, train, validation=[tmp_path / "none.jsonl"])
    assert [(item.file.name, item.line) for item in caught.value.problems] == [("train.jsonl", 1), ("none.jsonl", 0)]


def test_training_data_that_is_all_held_out_is_refused(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(3))
    with pytest.raises(ConfigError, match=r"data\.train: all of its conversations are also in data\.validation"):
        _prepare(base, file, validation=[file])


def test_a_special_token_in_the_default_system_prompt_is_its_settings_fault(base: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", records(3))
    with pytest.raises(ConfigError, match=r"data\.default_system: contains the special token <\|im_end\|>"):
        _prepare(base, file, default_system="Be brief.<|im_end|>")
