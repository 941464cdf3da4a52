import importlib
import sys
from pathlib import Path

import pytest

from loramux_base.embedded import EmbeddedBaseMissing, embedded_base
from loramux_server.config import ConfigError
from loramux_server.hub import resolve_model
from loramux_trainer.config_file import load_config
from loramux_trainer.errors import ConfigError as TrainerConfigError

SETTINGS = "base: {base}\noutput: out\ndata: {{train: [data.jsonl]}}\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `loramux_demo` without a base, found before the real one."""
    directory = tmp_path / "site" / "loramux_demo"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("raise RuntimeError('found, not imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "loramux_demo"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return directory


@pytest.fixture
def base(package: Path) -> Path:
    (package / "base").mkdir()
    (package / "base" / "config.json").write_text("{}")
    return package / "base"


def test_demo_is_the_base_of_the_installed_package(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a directory of that name lies, as in our own tree."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert resolve_model("demo") == embedded_base() == base.resolve()


def test_a_directory_named_demo_is_reached_as_a_path(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert resolve_model("./demo") == tmp_path / "demo"


def test_a_package_without_a_base_is_named_with_the_way_out(package: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--model demo .*holds none; install the package again"):
        resolve_model("demo")


def test_a_missing_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^--model demo .*not installed; `pip install loramux-demo`"):
        resolve_model("demo")
    with pytest.raises(EmbeddedBaseMissing):
        embedded_base()


def test_the_trainer_takes_the_same_name(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SETTINGS.format(base="demo"))
    assert load_config(tmp_path / "run.yaml").base == base.resolve()
    (tmp_path / "path.yaml").write_text(SETTINGS.format(base="./demo"))
    assert load_config(tmp_path / "path.yaml").base == tmp_path / "demo"
    assert load_config(tmp_path / "path.yaml", ["base=demo"]).base == base.resolve()


def test_the_trainer_names_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "run.yaml").write_text(SETTINGS.format(base="demo"))
    with pytest.raises(TrainerConfigError, match=r"run.yaml: base: demo .*not installed"):
        load_config(tmp_path / "run.yaml")
