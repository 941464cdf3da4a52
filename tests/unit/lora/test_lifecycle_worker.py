"""The life of adapters with the real validation worker: what becomes a version and what does not."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loramux_base.adapter import version_digest
from loramux_base.shapes import base_shapes
from loramux_server.errors import FailedPrecondition, LoramuxServerError, Reason
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.upload_request import UploadLimits, check_upload_request
from loramux_server.lora.validation import ServedBase, ValidationWorker
from loramux_server.tenancy.records import VersionRecord
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.adapters import TINY_CONFIG, safetensors_bytes, tensors_of, write_adapter
from tests.support.lifecycle_doubles import FakeEngine, tensors_record

BASE = base_shapes(TINY_CONFIG)
FINGERPRINT = "f" * 64


@pytest.fixture
async def life(tmp_path: Path) -> AsyncIterator[AdapterLifecycle]:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    worker = ValidationWorker(
        tmp_path / "config.json",
        max_rank=8,
        base=lambda: ServedBase(fingerprint=FINGERPRINT, parts={}),
        allow_unverified=True,
    )
    store = LocalStore(tmp_path / "store")
    made = AdapterLifecycle(Registry(tmp_path / "registry.sqlite"), store, worker, FakeEngine(), allow_unverified=True)
    await made.start()
    yield made
    await made.close()
    await worker.close()


async def publish(life: AdapterLifecycle, directory: Path, tensors: bytes | None = None) -> VersionRecord:
    data = (directory / "adapter_model.safetensors").read_bytes() if tensors is None else tensors
    manifest = directory / "loramux_manifest.json"
    request = check_upload_request(
        adapter="bot",
        config=(directory / "adapter_config.json").read_bytes(),
        manifest=manifest.read_bytes() if manifest.exists() else None,
        files=[tensors_record(data)],
        labels={},
        limits=UploadLimits(),
        allow_unverified=True,
    )
    upload = await life.start_upload("default", request)
    if upload.committed_bytes < len(data):
        await life.write_upload("default", upload.upload_id, 0, data)
    return await life.finish_upload("default", upload.upload_id)


async def test_good_adapters_become_versions_and_bad_ones_do_not(life: AdapterLifecycle, tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "plain", tensors_of(BASE))
    version = await publish(life, plain)
    assert version.digest == version_digest(plain)
    assert (version.max_rank, version.slab_units, version.base_fingerprint) == (4, 1, "")
    assert not version.base_verified and "q_proj" in version.modules
    manifest = {"format_version": 1, "base_fingerprint": FINGERPRINT}
    verified = await publish(life, write_adapter(tmp_path / "verified", tensors_of(BASE), manifest=manifest))
    assert verified.base_verified and verified.base_fingerprint == FINGERPRINT
    assert verified.digest != version.digest

    foreign = {"format_version": 1, "base_fingerprint": "0" * 64}
    good = safetensors_bytes(tensors_of(BASE))
    bad = [
        (write_adapter(tmp_path / "foreign", tensors_of(BASE), manifest=foreign), None, Reason.ADAPTER_INCOMPATIBLE),
        (write_adapter(tmp_path / "nan", tensors_of(BASE, value=float("nan"))), None, Reason.ADAPTER_NUMERICS),
        (write_adapter(tmp_path / "rank", tensors_of(BASE, rank=9), r=9), None, Reason.ADAPTER_INCOMPATIBLE),
        (write_adapter(tmp_path / "shape", tensors_of(BASE), r=5), None, Reason.ADAPTER_INCOMPATIBLE),
        (plain, good[:-1], Reason.ADAPTER_INCOMPATIBLE),
        (plain, b"PK\x03\x04 a pickle under another name", Reason.ADAPTER_INCOMPATIBLE),
    ]
    for directory, tensors, reason in bad:
        with pytest.raises(LoramuxServerError) as caught:
            await publish(life, directory, tensors)
        assert isinstance(caught.value, FailedPrecondition) and caught.value.reason is reason
        assert str(tmp_path) not in caught.value.message
    versions, _ = life.registry.list_versions("default", "bot", limit=10)
    assert [item.digest for item in versions] == [verified.digest, version.digest]
    assert list((tmp_path / "store" / ".uploads").iterdir()) == []
    assert len(list((tmp_path / "store" / "objects" / "default").iterdir())) == 2
