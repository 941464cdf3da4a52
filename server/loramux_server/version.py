"""Version of the server software."""

from importlib import metadata


def server_version() -> str:
    """Return the version of the installed distribution; `0+unknown` in a bare source tree."""
    try:
        return metadata.version("loramux")
    except metadata.PackageNotFoundError:
        return "0+unknown"
