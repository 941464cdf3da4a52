"""Digests that tie an adapter's files to its manifest. Imports no torch."""

import hashlib
from pathlib import Path

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME, TENSORS_NAME, AdapterManifest
from loramux_base.adapter_error import incompatible

DIGESTS_KEY = "sha256"
"""Key of the manifest: file name -> SHA-256, hex."""

_FILES = (CONFIG_NAME, TENSORS_NAME)


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that the manifest speaks of."""
    result = {}
    for name in _FILES:
        with (directory / name).open("rb") as stream:
            result[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return result


def check_files(directory: Path, manifest: AdapterManifest) -> None:
    """Refuse files that changed after the run wrote them; a manifest without digests passes.

    The server compares an upload with what the client read, so it cannot see a change that came before.

    Raises:
        AdapterFormatError: Names the file.
    """
    wanted = manifest.extra.get(DIGESTS_KEY)
    if wanted is None:
        return
    try:
        found = file_digests(directory)
    except OSError as error:
        raise incompatible(DIGESTS_KEY, f"a file cannot be read ({error.strerror}): {error.filename}") from error
    for name, digest in found.items():
        if not isinstance(wanted, dict) or wanted.get(name) != digest:
            raise incompatible(
                DIGESTS_KEY,
                f"{name} is not as the run wrote it ({MANIFEST_NAME}): it was damaged or changed; copy it again or "
                "train again",
            )
