"""`loramux_manifest.json`: what an adapter says about the base that it was trained on. Imports no torch."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from loramux_base.adapter_error import incompatible, parse_json_object, shown

MANIFEST_NAME = "loramux_manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
FORMAT_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterManifest:
    """The manifest's checked fields; keys that this version does not know are ignored.

    Attributes:
        base_fingerprint: Digest of the base, 64 hex digits.
        base_parts: Part of the base (`config`, `weights`, ...) -> its digest, to name what differs.
        extra: Everything else, unchecked.
    """

    base_fingerprint: str
    base_parts: Mapping[str, str]
    extra: Mapping[str, Any]

    @classmethod
    def from_json(cls, data: bytes) -> "AdapterManifest":
        """Parse the file.

        Raises:
            AdapterFormatError: Not JSON, another format version, or a field of the wrong type.
        """
        raw = parse_json_object(data, MANIFEST_NAME)
        version = raw.pop("format_version", None)
        if isinstance(version, bool) or version != FORMAT_VERSION:
            raise incompatible(
                "format_version",
                f"{MANIFEST_NAME}: format_version is {shown(version)}, this server reads {FORMAT_VERSION}; "
                "publish with a matching trainer",
            )
        fingerprint = raw.pop("base_fingerprint", None)
        if not isinstance(fingerprint, str) or not _DIGEST.fullmatch(fingerprint):
            raise incompatible("base_fingerprint", f"{MANIFEST_NAME}: base_fingerprint must be 64 hex digits")
        parts = raw.pop("base_parts", {})
        if not isinstance(parts, dict) or not all(isinstance(value, str) for value in parts.values()):
            raise incompatible("base_parts", f"{MANIFEST_NAME}: base_parts must map names to digests")
        return cls(base_fingerprint=fingerprint, base_parts=parts, extra=raw)

    def check_base(self, fingerprint: str, parts: Mapping[str, str]) -> None:
        """Refuse another base.

        Args:
            fingerprint: Digest of the base that is served.
            parts: Its parts.

        Raises:
            AdapterFormatError: ADAPTER_INCOMPATIBLE, naming the parts that differ.
        """
        if self.base_fingerprint == fingerprint:
            return
        names = sorted(name for name in {*self.base_parts, *parts} if self.base_parts.get(name) != parts.get(name))
        which = f" ({', '.join(shown(name)[1:-1] for name in names[:8])} differ)" if names and self.base_parts else ""
        raise incompatible(
            "base_fingerprint",
            f"the adapter was trained on base {self.base_fingerprint[:16]}, this server serves {fingerprint[:16]}"
            f"{which}; train it on this base or publish it to a server of its own base",
        )
