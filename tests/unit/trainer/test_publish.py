import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux import Client
from loramux.testing import FakeError, FakeServer
from loramux_base.adapter_digests import file_digests
from loramux_trainer.errors import PublishRefused
from loramux_trainer.publish import Target, publish

FINGERPRINT = "0" * 64
"""What the fake server serves."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


def _adapter(directory: Path, *, fingerprint: str = FINGERPRINT, template: str = "") -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"tensors")
    manifest = {"format_version": 1, "base_fingerprint": fingerprint, "base_parts": {"chat_template": template}}
    (directory / "loramux_manifest.json").write_text(json.dumps(manifest))
    return directory


def test_a_version_is_uploaded_and_gets_the_traffic_if_wanted(server: FakeServer, tmp_path: Path) -> None:
    first = publish(_adapter(tmp_path / "a"), Target(server=server.address, name="acme", tenant="shop"))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"others")
    second = publish(tmp_path / "a", Target(server=server.address, name="acme", tenant="shop", promote=False))
    assert first.digest != second.digest
    with Client(server.address, tenant="shop") as client:
        (target,) = client.adapters.get("acme").traffic
    assert target.version == first.name


def test_another_base_is_refused_before_a_byte_is_sent(server: FakeServer, tmp_path: Path) -> None:
    with pytest.raises(PublishRefused, match="was trained on base 1111111111111111, this server serves 0000"):
        publish(_adapter(tmp_path / "a", fingerprint="1" * 64), Target(server=server.address, name="acme"))
    assert not server.calls_of("StartAdapterUpload")


def test_another_template_is_refused_unless_allowed(server: FakeServer, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a", template="2" * 64)
    with pytest.raises(PublishRefused, match="another template"):
        publish(adapter, Target(server=server.address, name="acme"))
    publish(adapter, Target(server=server.address, name="acme", allow_other_template=True))


def test_an_adapter_of_unknown_base_is_refused(tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a")
    (adapter / "loramux_manifest.json").write_text("{}")
    with pytest.raises(PublishRefused, match="format_version"):
        publish(adapter, Target(server="localhost:1", name="acme"))
    (adapter / "loramux_manifest.json").unlink()
    with pytest.raises(PublishRefused, match=r"has no loramux_manifest\.json"):
        publish(adapter, Target(server="localhost:1", name="acme"))


def test_a_file_changed_after_training_is_refused_before_a_byte_is_sent(server: FakeServer, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "a")
    manifest = json.loads((adapter / "loramux_manifest.json").read_text())
    (adapter / "loramux_manifest.json").write_text(json.dumps({**manifest, "sha256": file_digests(adapter)}))
    publish(adapter, Target(server=server.address, name="acme"))
    calls = len(server.calls_of("StartAdapterUpload"))
    for name, changed in (("adapter_model.safetensors", b"tensorS"), ("adapter_config.json", b"{ }")):
        kept = (adapter / name).read_bytes()
        (adapter / name).write_bytes(changed)
        with pytest.raises(PublishRefused, match=f"{name} is not as the run wrote it"):
            publish(adapter, Target(server=server.address, name="acme"))
        (adapter / name).write_bytes(kept)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(PublishRefused, match=r"adapter_config\.json is missing"):
        publish(adapter, Target(server=server.address, name="acme"))
    assert len(server.calls_of("StartAdapterUpload")) == calls


def test_a_server_that_is_not_there_is_told_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(PublishRefused, match=r"localhost:1: no server answers there .*; start it or correct --server"):
        publish(_adapter(tmp_path / "a"), Target(server="localhost:1", name="acme"))


@pytest.mark.parametrize("name", ["", "A b", "../x", "a/b", "x" * 300])
def test_a_name_that_is_none_is_refused(server: FakeServer, tmp_path: Path, name: str) -> None:
    with pytest.raises(PublishRefused, match="INVALID_PARAMETER") as caught:
        publish(_adapter(tmp_path / "a"), Target(server=server.address, name=name))
    assert len(str(caught.value)) < 600


def test_the_servers_refusal_is_told(server: FakeServer, tmp_path: Path) -> None:
    refusal = FakeError("FAILED_PRECONDITION", "ADAPTER_INCOMPATIBLE", "rank 8 is over this server's limit")
    server.fail("FinishAdapterUpload", refusal)
    with pytest.raises(PublishRefused, match="rank 8 is over") as caught:
        publish(_adapter(tmp_path / "a"), Target(server=server.address, name="acme"))
    assert caught.value.exit_code == 6
