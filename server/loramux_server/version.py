"""Version of the server software."""

import tomllib
from importlib import metadata
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def server_version(project: Path = _PROJECT) -> str:
    """Return the version of the installed distribution, or of the source tree that this runs from with `+source`."""
    try:
        return metadata.version("loramux")
    except metadata.PackageNotFoundError:
        if not project.is_file():
            return "0+unknown"
        return f"{tomllib.loads(project.read_text(encoding='utf-8'))['project']['version']}+source"
