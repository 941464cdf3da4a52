"""The check of an adapter's files against its manifest, as a user of the trainer meets it. Imports no torch."""

from pathlib import Path

from loramux_base.adapter import AdapterManifest
from loramux_base.adapter_digests import DIGESTS_KEY, check_digests
from loramux_base.adapter_error import incompatible


def check_files(directory: Path, manifest: AdapterManifest) -> None:
    """Refuse files that changed after the run wrote them; see `check_digests`.

    Raises:
        AdapterFormatError: Names the file.
    """
    try:
        check_digests(directory, manifest)
    except OSError as error:
        raise incompatible(DIGESTS_KEY, f"a file cannot be read ({error.strerror}): {error.filename}") from error
