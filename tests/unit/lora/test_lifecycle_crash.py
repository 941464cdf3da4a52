"""A server that dies at a point of a commit: the next one finds the old state or the new, and no leftovers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import VersionState
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import digest_of

# Uploads "v1" and then dies inside the named function, before or after its work.
VICTIM = """
import asyncio, os, sys
from pathlib import Path
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import FakeEngine, FakeValidator, digest_of, upload_request

root, owner, method, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
kind = {"Registry": Registry, "LocalStore": LocalStore}[owner]
real = getattr(kind, method)

def dying(self, *args, **kwargs):
    if when == "after":
        real(self, *args, **kwargs)
    os._exit(9)

async def main():
    registry, store = Registry(root / "registry.sqlite"), LocalStore(root / "store")
    life = AdapterLifecycle(registry, store, FakeValidator(), FakeEngine())
    await life.start()
    upload = await life.start_upload("default", upload_request(b"v1"))
    await life.write_upload("default", upload.upload_id, 0, b"v1")
    if method in ("commit_version", "place", "begin_object"):
        setattr(kind, method, dying)
    await life.finish_upload("default", upload.upload_id)
    setattr(kind, method, dying)
    reference = AdapterReference(tenant="default", adapter="bot", version=digest_of("v1"))
    await life.delete_version("default", reference)
    life.engine_state()
    await asyncio.sleep(30)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("owner", "method", "when", "survives"),
    [
        ("Registry", "begin_object", "after", False),
        ("LocalStore", "place", "before", False),
        ("LocalStore", "place", "after", False),
        ("Registry", "commit_version", "before", False),
        ("Registry", "commit_version", "after", True),
        ("Registry", "delete_version", "before", True),
        ("Registry", "delete_version", "after", False),
        ("Registry", "finish_drain", "after", False),
        ("LocalStore", "remove", "before", False),
        ("LocalStore", "remove", "after", False),
    ],
)
def test_a_crash_leaves_the_old_state_or_the_new(
    tmp_path: Path, owner: str, method: str, when: str, survives: bool
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, str(tmp_path), owner, method, when],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 9, "it died where it should"
    registry, store = Registry(tmp_path / "registry.sqlite"), LocalStore(tmp_path / "store")
    for tenant, digest in registry.recover():
        store.remove(tenant, digest)
    registry.forget_objects()
    registry.check_integrity()
    reference = AdapterReference(tenant="default", adapter="bot", version=digest_of("v1"))
    snapshot = registry.snapshot()
    ready = [
        version
        for state in snapshot.adapters.values()
        for version in state.versions
        if version.state is VersionState.READY
    ]
    objects = list((tmp_path / "store" / "objects").glob("*/*"))
    if survives:
        assert registry.get_version(reference).state is VersionState.READY
        assert [path.name for path in objects] == [digest_of("v1")]
        assert (objects[0] / "adapter_model.safetensors").read_text() == "v1"
    else:
        assert ready == [] and objects == []
    assert list((tmp_path / "store" / ".uploads").iterdir()) == []
    registry.close()
    store.close()
