"""The error of the adapter format and the strict JSON reader that raises it."""

import json
from pathlib import Path
from typing import Any, Literal

FormatReason = Literal["ADAPTER_INCOMPATIBLE", "ADAPTER_NUMERICS", "INVALID_PARAMETER"]


class AdapterFormatError(ValueError):
    """An adapter that cannot be served.

    Attributes:
        reason: Machine-readable cause, one of the API's reasons.
        field: What it is about: a configuration key, a tensor name or a file name; ASCII, at most 200 characters.
        message: One sentence that names the field and the way out; holds no path.
    """

    def __init__(self, reason: FormatReason, field: str, message: str) -> None:
        super().__init__(message)
        self.reason: FormatReason = reason
        # It may be the author's text, with characters that no message can carry.
        self.field = ascii(field)[1:-1][:200]
        self.message = message


def incompatible(field: str, message: str) -> AdapterFormatError:
    """An `AdapterFormatError` with the reason ADAPTER_INCOMPATIBLE."""
    return AdapterFormatError("ADAPTER_INCOMPATIBLE", field, message)


def shown(value: object) -> str:
    """The value as error texts show it: ASCII, at most 80 characters, since it came from the adapter's author."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        AdapterFormatError: Not there, not a regular file, or larger.
    """
    name = path.name
    if path.is_symlink() or not path.is_file():
        raise incompatible(name, f"{name} is missing or not a regular file; an adapter directory must hold it")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise incompatible(name, f"{name} has more than {limit} bytes")
    return data


def parse_json_object(data: bytes, name: str) -> dict[str, Any]:
    """Parse JSON strictly: UTF-8, an object, no duplicate keys, no NaN or Infinity.

    Args:
        data: The bytes; the caller bounds their number.
        name: What the error texts call the document.

    Raises:
        AdapterFormatError: Not such a document.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise incompatible(name, f"{name} holds the key {shown(key)} twice; remove one")
            found[key] = value
        return found

    def no_constant(constant: str) -> float:
        raise incompatible(name, f"{name} holds {constant}, which is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except AdapterFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise incompatible(name, f"{name} is not valid UTF-8 JSON") from error
    if not isinstance(value, dict):
        raise incompatible(name, f"{name} must hold one JSON object")
    return value
