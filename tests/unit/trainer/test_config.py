import os
from pathlib import Path

import pytest

from loramux_trainer.config_file import load_config
from loramux_trainer.errors import ConfigError

GOOD = "base: models/tiny\noutput: /runs/one\ndata:\n  train: a.jsonl\ntrain:\n  learning_rate: 2e-4\n"


def _write(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_defaults_hold(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, GOOD))
    assert config.base == tmp_path / "models/tiny"
    assert config.output == Path("/runs/one")
    assert config.data.train == (tmp_path / "a.jsonl",)
    assert config.train.learning_rate == 2e-4
    assert config.lora.modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_overrides_win(tmp_path: Path) -> None:
    options = ["lora.r=32", "lora.target_modules=[v_proj, q_proj]", "train.learning_rate=1e-3", "data.train=b.jsonl"]
    config = load_config(_write(tmp_path, GOOD), options)
    assert (config.lora.r, config.lora.modules) == (32, ("q_proj", "v_proj"))
    assert config.train.learning_rate == 1e-3
    assert config.data.train == (Path("b.jsonl"),)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (GOOD + "lorra: {}\n", [], "lorra: there is no such setting"),
        (GOOD, ["lora.rank=8"], "lora.rank: there is no such setting"),
        (GOOD, ["lora.r='8'"], "lora.r: must be a whole number, got '8'"),
        (GOOD, ["lora.r=0"], "lora.r: "),
        (GOOD, ["train.learning_rate=.nan"], "train.learning_rate: "),
        (GOOD, ["lora.target_modules=[lm_head]"], "unknown modules lm_head"),
        (GOOD, ["train.epochs=0"], "train.epochs: "),
        (GOOD, ["lora.r"], "write it as section.setting=value"),
        (GOOD, ["seed.x=1"], ""),
        (GOOD, ["data.validation_share=0", "train.eval_steps=5"], "train.eval_steps needs validation data"),
        (GOOD, ["train.keep=best"], "keep: best needs eval_steps"),
        (GOOD, ["train.keep=best", "train.eval_steps=5", "train.save_steps=2"], "leave save_steps out"),
        (GOOD, ["train.patience=2"], "patience needs keep: best"),
        (GOOD, ["data=3"], "data: must be a section with settings, got '3'"),
        (GOOD, ["lora="], "lora: must be a section with settings, it is empty"),
        (GOOD, ["data.train=[]"], "data.train: must not be empty, got '[]'"),
        (GOOD, ["data.train=[1]"], "data.train.0: must be a path, got '1'"),
        (GOOD, ["data.default_system='  '"], "data.default_system: has no text"),
        (GOOD, ["data.group_key=''"], "data.group_key: must not be empty"),
        (GOOD, ["lora.target_modules=q_proj"], "lora.target_modules: must be all-linear or a list of q_proj"),
        (GOOD, ["lora.alpha=" + "9" * 400], "lora.alpha: must be less than or equal to 25600"),
        (GOOD, ["train.epochs=1e308"], "train.epochs: must be less than or equal to 1000000"),
        (GOOD, ["train.batch_size=99999999999999999999"], "train.batch_size: must be less than"),
        (GOOD, ["train.max_steps=99999999999999999999"], "train.max_steps: must be less than"),
        (GOOD, ["train.weight_decay=1e400"], "train.weight_decay: must be a finite number"),
        (GOOD, ["seed=4294967296"], "seed: must be less than 4294967296"),
        (GOOD, ["seed=!!int x"], "-o seed=!!int x:1: this is no int"),
        (GOOD, ["seed=2020-99-99"], "-o seed=2020-99-99:1: this is no timestamp"),
        (GOOD, ["seed=" + "9" * 5000], "this is no int"),
        (GOOD, ["a..b=1"], "write it as section.setting=value"),
        (GOOD, ["data.train.x=1"], "-o data.train.x=1: train is no section"),
        (GOOD, ['base="a\\0b"'], "base: a path cannot hold the character NUL"),
        ("base: " + "[" * 3000 + "]" * 3000, [], "run.yaml: is nested too deeply"),
        ("base: a\0b\n", [], "unacceptable character #x0000"),
        ("base: x\n---\nbase: y\n", [], "run.yaml:2: but found another document"),
        ("base: x\noutput: y\n", [], "data: is missing"),
        ("base: x\nbase: y\n", [], "run.yaml:2: key 'base' is there twice"),
        ("base: [\n", [], "run.yaml:2: "),
        ("- 1\n", [], "must hold settings"),
        ("base: !!python/object/apply:os.getcwd []\n", [], "could not determine a constructor"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, options: list[str], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(_write(tmp_path, text), options)
    assert reason in str(caught.value)
    assert all(0 < len(line) < 400 for line in str(caught.value).splitlines())
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "."):
        with pytest.raises(ConfigError, match="is no regular file"):
            load_config(tmp_path / name)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: cannot be read .* it must be UTF-8"):
        load_config(tmp_path / "bytes.yaml")


def test_the_digest_follows_what_changes_the_adapter(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD)
    digest = load_config(path).digest()
    for option in ("output=elsewhere", "train.log_steps=1", "train.save_steps=3", "data.train=b.jsonl"):
        assert load_config(path, [option]).digest() == digest
    for option in ("lora.r=8", "seed=1", "train.batch_size=4", "data.normalize=nfkc"):
        assert load_config(path, [option]).digest() != digest
