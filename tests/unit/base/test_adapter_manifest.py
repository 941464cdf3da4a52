import json
from pathlib import Path
from typing import Any

import pytest

from loramux_base.adapter import AdapterFormatError, AdapterManifest, read_manifest

GOOD: dict[str, Any] = {
    "format_version": 1,
    "base_fingerprint": "ab" * 32,
    "base_parts": {"weights": "1", "config": "2"},
}


def parse(**changes: Any) -> AdapterManifest:
    return AdapterManifest.from_json(json.dumps({**GOOD, **changes}).encode())


def test_keys_of_later_versions_are_kept_unchecked() -> None:
    manifest = parse(probes=[1, 2], trainer={"version": "9"})
    assert manifest.base_fingerprint == "ab" * 32
    assert manifest.extra == {"probes": [1, 2], "trainer": {"version": "9"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format_version", 2),
        ("format_version", True),
        ("format_version", None),
        ("base_fingerprint", "AB" * 32),
        ("base_fingerprint", "ab" * 31),
        ("base_fingerprint", 3),
        ("base_parts", ["weights"]),
        ("base_parts", {"weights": 1}),
    ],
)
def test_refused_fields(field: str, value: Any) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        parse(**{field: value})
    assert (caught.value.field, caught.value.reason) == (field, "ADAPTER_INCOMPATIBLE")


def test_the_parts_that_differ_are_named() -> None:
    manifest = parse()
    manifest.check_base("ab" * 32, {"weights": "other, but the digest over all is what counts"})
    with pytest.raises(AdapterFormatError, match=r"\(tokenizer, weights differ\)"):
        manifest.check_base("cd" * 32, {"weights": "9", "config": "2", "tokenizer": "3"})
    with pytest.raises(AdapterFormatError, match="serves cdcdcdcdcdcdcdcd; train"):
        parse(base_parts={}).check_base("cd" * 32, {"weights": "9"})


def test_reading(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    path = tmp_path / "loramux_manifest.json"
    path.write_text(json.dumps(GOOD))
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest.base_parts == GOOD["base_parts"]
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(AdapterFormatError, match="more than 1048576 bytes"):
        read_manifest(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        read_manifest(tmp_path)
