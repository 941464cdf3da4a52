import json
from typing import Any

import pytest

from loramux_server.errors import FailedPrecondition, InvalidRequest, LoramuxServerError, Reason
from loramux_server.lora.upload_request import UploadLimits, UploadRequest, check_upload_request
from loramux_server.tenancy.records import FileRecord
from tests.support.lifecycle_doubles import CONFIG, tensors_record

MANIFEST = json.dumps({"format_version": 1, "base_fingerprint": "0" * 64}).encode()
LIMITS = UploadLimits(config_bytes=1000, manifest_bytes=500, adapter_bytes=5000)


def check(**changes: Any) -> UploadRequest:
    arguments = {
        "adapter": "bot",
        "config": CONFIG,
        "manifest": MANIFEST,
        "files": (tensors_record(b"x"),),
        "labels": {},
        "limits": LIMITS,
        "allow_unverified": False,
        **changes,
    }
    return check_upload_request(**arguments)


def refused(**changes: Any) -> LoramuxServerError:
    with pytest.raises(LoramuxServerError) as caught:
        check(**changes)
    return caught.value


def file(name: str) -> FileRecord:
    return FileRecord(name=name, size=1, sha256="0" * 64)


def test_a_good_request_passes() -> None:
    request = check(labels={"team": "x"})
    assert request.total_bytes == len(CONFIG) + len(MANIFEST) + 1


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "a.pt", "a.PTH", "x.ckpt", "x.zip", "x.nemo", "../../x.pkl", "adapter_model.safetensors.pt"],
)
def test_pickles_are_refused_by_name(name: str) -> None:
    error = refused(files=(file(name),))
    assert error.reason is Reason.INVALID_PARAMETER and "pickled" in error.message and error.field == "files[0].name"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "README.md",
        "../adapter_model.safetensors",
        "/adapter_model.safetensors",
        "adapter_model.safetensors\0",
        "adapter_model.safetensors ",
        "Adapter_model.safetensors",
        "adapter_config.json",
        "loramux_manifest.json",
        "x" * 300,
    ],
)
def test_other_file_names_are_refused(name: str) -> None:
    error = refused(files=(file(name),))
    assert error.field == "files[0].name" and error.message.isascii() and len(error.message) < 300


def test_exactly_one_file_with_size_and_digest() -> None:
    good = tensors_record(b"x")
    assert refused(files=()).field == "files"
    assert refused(files=(good, good)).field == "files"
    assert refused(files=(good,) * 1_000_000).field == "files"
    assert refused(files=(FileRecord(name=good.name, size=0, sha256=good.sha256),)).field == "files[0].size"
    for digest in ("", good.sha256.upper(), good.sha256[:-1], good.sha256 + "0", "é" * 64):
        assert refused(files=(FileRecord(name=good.name, size=1, sha256=digest),)).field == "files[0].sha256"


def test_sizes_are_bounded() -> None:
    assert refused(config=b"").field == "adapter_config"
    assert refused(config=CONFIG + b" " * 1000).field == "adapter_config"
    assert refused(manifest=MANIFEST + b" " * 500).field == "manifest"
    huge = FileRecord(name="adapter_model.safetensors", size=2**63, sha256="0" * 64)
    assert refused(files=(huge,)).field == "files[0].size"


def test_labels_are_bounded() -> None:
    check(labels={str(n): "x" * 255 for n in range(32)})
    for labels in ({str(n): "" for n in range(33)}, {"": "x"}, {"k" * 64: "x"}, {"ü" * 32: "x"}, {"k": "x" * 256}):
        assert refused(labels=labels).field == "labels"


@pytest.mark.parametrize(
    "config",
    [
        b"{",
        b"\xff",
        b"[]",
        b'{"peft_type": "IA3"}',
        json.dumps({"peft_type": "LORA", "r": 8, "use_dora": True}).encode(),
        json.dumps({"peft_type": "LORA", "r": 8, "bias": "all"}).encode(),
        json.dumps({"peft_type": "LORA", "r": 8, "modules_to_save": ["x"]}).encode(),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused_before_any_byte(config: bytes) -> None:
    error = refused(config=config)
    assert isinstance(error, FailedPrecondition) and error.reason is Reason.ADAPTER_INCOMPATIBLE
    assert error.field == "adapter_config"


def test_the_manifest_is_required_unless_unverified_adapters_are_taken() -> None:
    error = refused(manifest=None)
    assert error.reason is Reason.ADAPTER_INCOMPATIBLE and "--allow-unverified-adapters" in error.message
    assert check(manifest=None, allow_unverified=True).manifest is None
    assert refused(manifest=b"{}").field == "manifest"
    assert refused(manifest=b"").field == "manifest"


def test_bad_requests_are_told_from_unmet_conditions() -> None:
    assert isinstance(refused(config=b""), InvalidRequest)
