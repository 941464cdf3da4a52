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
        (GOOD, ["lora.r='8'"], "lora.r: Input should be a valid integer, got '8'"),
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
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_the_digest_follows_what_changes_the_adapter(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD)
    digest = load_config(path).digest()
    for option in ("output=elsewhere", "train.log_steps=1", "train.save_steps=3", "data.train=b.jsonl"):
        assert load_config(path, [option]).digest() == digest
    for option in ("lora.r=8", "seed=1", "train.batch_size=4", "data.normalize=nfkc"):
        assert load_config(path, [option]).digest() != digest
