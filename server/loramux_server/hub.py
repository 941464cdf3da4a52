"""Where a base checkpoint lies.

A directory, a hub id that `huggingface_hub` downloads or finds in its cache, or `demo`, the embedded base.
"""

import re
from pathlib import Path

from loramux_base.embedded import DEMO_NAME, EmbeddedBaseMissing, embedded_base
from loramux_server.config import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve_model(model: str, *, flag: str = "--model") -> Path:
    """Return the directory of a checkpoint. Blocks while it downloads.

    Args:
        model: Directory, hub id (`owner/name`), or `demo`. HF_HUB_OFFLINE=1 looks into the local cache only.
        flag: Name of the setting, for errors.

    Raises:
        ConfigError: It is none of these, or it cannot be fetched.
    """
    if model == DEMO_NAME:
        try:
            return embedded_base()
        except EmbeddedBaseMissing as error:
            raise ConfigError(f"{flag} {model} {error}") from error
    directory = Path(model)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ConfigError(f"{flag} {model} has no config.json; give the directory of a checkpoint")
        return directory.resolve()
    if directory.exists():
        raise ConfigError(f"{flag} {model} is a file; give the directory of a checkpoint")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{flag} {model} does not exist; give the directory of a checkpoint or a hub id")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(
            f"{flag} {model} is no directory, and hub ids need huggingface_hub; install it or give a directory"
        ) from error
    try:
        found = snapshot_download(model, allow_patterns=list(_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{flag} {model} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, or give a directory"
        ) from error
    return Path(found)
