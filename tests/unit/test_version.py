from importlib import metadata
from pathlib import Path

import pytest

from loramux._version import __version__
from loramux_server.version import server_version


def test_a_source_tree_knows_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert server_version() == f"{__version__}+source"
    assert server_version(tmp_path / "nowhere") == "0+unknown"


def test_an_installed_one_has_that_of_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 1.2")
    assert server_version() == "loramux 1.2"
