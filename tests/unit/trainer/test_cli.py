import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramux_base.embedded import EmbeddedBaseMissing
from loramux_trainer import cli
from loramux_trainer.config import RunConfig
from loramux_trainer.config_file import load_config
from tests.unit.trainer.conftest import records, write_jsonl

README = Path(cli.__file__).parents[1] / "README.md"


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["loramux-train", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def run_file(base: Path, tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "data.jsonl", records(12))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: {base}\noutput: run\ndevice: cpu\ndata: {{train: data.jsonl, max_length: 128}}\n"
        "lora: {r: 4, alpha: 8}\ntrain: {max_steps: 4, batch_size: 2, learning_rate: 1e-2, log_steps: 2}\n"
    )
    return path


def test_train_and_eval(
    run_file: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "train", str(run_file), "-o", "lora.r=2", "--json") == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["adapter"] == str(tmp_path / "run" / "adapter")
    assert result["lora"]["r"] == 2
    assert "step 2/4  loss" in shown.err
    assert "\x1b" not in shown.err, "plain when piped"

    arguments = ["eval", str(tmp_path / "run"), str(tmp_path / "data.jsonl"), "--base", str(base), "--device", "cpu"]
    assert _main(monkeypatch, *arguments, "--json", "--min-gain", "0") == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["adapter"]["loss"] < compared["base"]["loss"]
    assert _main(monkeypatch, *arguments, "--min-gain", "50") == 5
    assert "lowers the loss by" in capsys.readouterr().err


def test_errors_are_lines_with_the_status_and_no_trace(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + "{\n[1]\n")
    assert _main(monkeypatch, "train", str(run_file)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["error", f"{data}:{number}"] for number in (13, 14)]
    assert not (tmp_path / "run").exists()
    assert _main(monkeypatch, "train", str(run_file), "-o", "lora.rank=2") == 2
    assert "lora.rank: there is no such setting" in capsys.readouterr().err
    assert _main(monkeypatch, "publish", str(tmp_path), "--server", "localhost:1", "--name", "a") == 6
    assert "has no loramux_manifest.json" in capsys.readouterr().err
    assert _main(monkeypatch, "eval", str(tmp_path), str(data), "--base", str(tmp_path)) == 2


def test_names_that_look_like_markup_are_shown_as_they_are(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "[red]:smile:"
    shutil.copytree(base, named)
    lines = [*records(6), {"dialogue": [{"user": "word " * 200, "assistant": "b"}]}]
    write_jsonl(tmp_path / "[b]:x:.jsonl", lines)
    run = tmp_path / "run.yaml"
    settings = {
        "base": str(named),
        "output": str(tmp_path / "[/i]:+1:"),
        "device": "cpu",
        "data": {"train": "[b]:x:.jsonl", "max_length": 128},
        "train": {"max_steps": 1},
    }
    run.write_text(json.dumps(settings))
    assert _main(monkeypatch, "train", str(run)) == 0
    shown = capsys.readouterr()
    assert "training on [red]:smile: (nf4" in shown.err
    assert "left out: [b]:x:.jsonl:7: too long" in shown.err
    assert f"adapter {tmp_path}/[/i]:+1:/adapter, version" in shown.out
    assert _main(monkeypatch, "train", str(run)) == 2
    assert "[/i]:+1: exists and is not empty" in capsys.readouterr().err


def test_the_configuration_of_the_readme_runs_as_printed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = README.read_text(encoding="utf-8")
    match = re.search(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert match is not None
    (tmp_path / "acme.yaml").write_text(match[1])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-nf4").symlink_to(base)
    write_jsonl(tmp_path / "acme.jsonl", records(12))
    # Every setting is shown with its default, but for what a run must name.
    config = load_config(tmp_path / "acme.yaml")
    required = {"base": config.base, "output": config.output, "data": {"train": config.data.train}}
    assert config == RunConfig.model_validate(required)
    assert set(yaml.safe_load(match[1])) == set(RunConfig.model_fields)
    assert _main(monkeypatch, "train", str(tmp_path / "acme.yaml"), "-o", "lora.r=32") == 0
    assert (tmp_path / "runs" / "acme" / "adapter" / "loramux_manifest.json").is_file()
    capsys.readouterr()


def test_a_gate_that_is_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(tmp_path), "a.jsonl", "--base", str(tmp_path), "--min-gain", "nan"]
    assert _main(monkeypatch, *arguments) == 2
    assert "--min-gain: nan is no number" in capsys.readouterr().err


def test_doctor(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(monkeypatch, "doctor", "--base", str(base), "--json") == 0
    checks: dict[str, dict[str, Any]] = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert {"torch", "trl", "device", "base", "weights", "template"} <= checks.keys()
    assert checks["weights"]["text"] == "NF4"
    assert checks["template"]["text"].endswith("'Hi<|im_end|>'")
    assert _main(monkeypatch, "doctor", "--base", "/nowhere") == 2
    assert "no such directory" in capsys.readouterr().out


FULL = """
import sys
import loramux_trainer.cli
heavy = {"torch", "transformers", "trl", "huggingface_hub"} & sys.modules.keys()
assert not heavy, heavy
import loramux_trainer.run
"""
LIGHT = "import loramux_trainer.environment"
REPORT = """
import huggingface_hub.constants as hub
print(int(hub.HF_HUB_OFFLINE), int(hub.HF_HUB_DISABLE_TELEMETRY))
"""


@pytest.mark.parametrize(("code", "asked", "seen"), [(FULL, None, "1 1"), (LIGHT, "0", "0 1")])
def test_the_hub_stays_off_unless_asked_and_help_needs_no_torch(code: str, asked: str | None, seen: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if asked is not None:
        environment["HF_HUB_OFFLINE"] = asked
    done = subprocess.run(
        [sys.executable, "-c", code + "\n" + REPORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == seen, done.stderr


def test_eval_takes_the_embedded_base_by_name(
    run_file: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(monkeypatch, "train", str(run_file)) == 0
    monkeypatch.setattr("loramux_trainer.config_file.embedded_base", lambda: base)
    arguments = ["eval", str(tmp_path / "run"), str(tmp_path / "data.jsonl"), "--device", "cpu", "--json", "--base"]
    capsys.readouterr()
    assert _main(monkeypatch, *arguments, str(base)) == 0
    expected = json.loads(capsys.readouterr().out)
    assert _main(monkeypatch, *arguments, "demo") == 0
    assert json.loads(capsys.readouterr().out) == expected


def test_eval_names_an_embedded_base_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise EmbeddedBaseMissing("is not installed; install it")

    monkeypatch.setattr("loramux_trainer.config_file.embedded_base", missing)
    assert _main(monkeypatch, "eval", str(tmp_path), "a.jsonl", "--base", "demo") == 2
    assert "--base: demo is not installed; install it" in capsys.readouterr().err
