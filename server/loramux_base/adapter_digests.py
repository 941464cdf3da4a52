"""Digests that tie an adapter's files to its manifest. Imports no torch."""

import hashlib
import re
from pathlib import Path

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME, TENSORS_NAME, AdapterManifest
from loramux_base.adapter_error import incompatible

DIGESTS_KEY = "sha256"
"""Key of the manifest: file name -> SHA-256, hex."""

_FILES = (CONFIG_NAME, TENSORS_NAME)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 16


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that the manifest speaks of, hex, by name.

    Raises:
        AdapterFormatError: One is missing or no regular file.
        OSError: One cannot be read.
    """
    return {name: _digest(directory / name) for name in _FILES}


def check_digests(directory: Path, manifest: AdapterManifest) -> None:
    """Refuse files that changed after the run wrote them; a manifest without digests passes.

    An upload is compared with what its client read, which shows no change that came before.

    Args:
        directory: The PEFT directory.
        manifest: Its manifest.

    Raises:
        AdapterFormatError: ADAPTER_INCOMPATIBLE, naming the file with the digest it should have and has; or the
            manifest's digests are malformed.
        OSError: A file cannot be read.
    """
    wanted = manifest.extra.get(DIGESTS_KEY)
    if wanted is None:
        return
    if not isinstance(wanted, dict):
        raise incompatible(
            DIGESTS_KEY,
            f"{MANIFEST_NAME}: {DIGESTS_KEY} must map file names to digests; take the file that the run wrote",
        )
    for name in _FILES:
        digest = wanted.get(name)
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise incompatible(
                DIGESTS_KEY,
                f"{MANIFEST_NAME}: {DIGESTS_KEY} has no 64 hex digits for {name}; take the file that the run wrote",
            )
        found = _digest(directory / name)
        if found != digest:
            raise incompatible(
                name,
                f"{name} is not as the run wrote it: {MANIFEST_NAME} says sha256 {digest[:_SHOWN]}, the file has "
                f"{found[:_SHOWN]}; it was damaged or changed: copy it again from the run, or train again",
            )


def _digest(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        raise incompatible(
            path.name, f"{path.name} is missing or not a regular file; an adapter directory must hold it"
        )
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
