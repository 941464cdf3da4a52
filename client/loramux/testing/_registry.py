"""Adapters of the fake server, in memory."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from loramux.testing._script import FakeError
from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2

REPLICA = "fake-0"
TENSOR_FILE = "adapter_model.safetensors"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


def now() -> Timestamp:
    """Return the time."""
    moment = Timestamp()
    moment.GetCurrentTime()
    return moment


def invalid(name: str, problem: str, reason: str = "INVALID_PARAMETER") -> FakeError:
    """Return the error for a refused field."""
    return FakeError("INVALID_ARGUMENT", reason, f"{name} {problem}", field_violations=[(name, problem)])


def not_found(name: str) -> FakeError:
    """Return the error for an adapter or version that is not there."""
    return FakeError("NOT_FOUND", "ADAPTER_NOT_FOUND", f"there is no adapter {name!r}")


@dataclass(slots=True)
class Upload:
    """An upload in progress."""

    upload_id: str
    tenant: str
    adapter: str
    config: bytes
    manifest: bytes
    file: pb.AdapterFile
    labels: dict[str, str]
    data: bytearray = field(default_factory=bytearray)

    def message(self) -> pb.AdapterUpload:
        """Describe it."""
        return pb.AdapterUpload(
            upload_id=self.upload_id,
            adapter=self.adapter,
            committed_bytes=len(self.data),
            total_bytes=self.file.size,
            expire_time=now(),
            replica_id=REPLICA,
        )


class Registry:
    """Adapters, versions, uploads, grants and watchers of all tenants; used on the server's loop only."""

    def __init__(self) -> None:
        self.revision = 0
        self.adapters: dict[str, pb.Adapter] = {}
        self.versions: dict[str, dict[str, pb.AdapterVersion]] = {}
        self.levels: dict[str, common_pb2.ResidencyLevel.ValueType] = {}
        self.uploads: dict[str, Upload] = {}
        self.grants: dict[str, pb.Grant] = {}
        self.usage: dict[tuple[str, str], pb.UsageEntry] = {}
        self.answers: dict[tuple[str, str, str], tuple[bytes, Message]] = {}
        self.watchers: set[asyncio.Queue[pb.WatchAdaptersResponse]] = set()

    def full_name(self, tenant: str, name: str) -> str:
        """Return the full name of an adapter; another tenant's is not found."""
        if not name:
            raise invalid("name", "is empty")
        full = name if name.startswith("tenants/") else f"tenants/{tenant}/adapters/{name}"
        parts = full.split("/")
        if len(parts) != 4 or parts[2] != "adapters" or not all(_NAME.fullmatch(part) for part in parts[1::2]):
            raise invalid("name", "is no adapter name; use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
        granted = f"{full}/grants/{tenant}" in self.grants
        if parts[1] != tenant and not granted:
            raise not_found(name)
        return full

    def adapter(self, tenant: str, name: str) -> pb.Adapter:
        """Return an adapter."""
        full = self.full_name(tenant, name)
        if full not in self.adapters:
            raise not_found(name)
        return self.adapters[full]

    def split(self, name: str) -> tuple[str, str | None]:
        """Split a name into adapter and version."""
        if name.startswith("tenants/") and "/versions/" in name:
            adapter, _, version = name.partition("/versions/")
            return adapter, version
        adapter, at, version = name.partition("@")
        return adapter, version if at else None

    def version(self, tenant: str, name: str) -> pb.AdapterVersion:
        """Return the version that a request with this adapter name gets."""
        adapter_name, version = self.split(name)
        adapter = self.adapter(tenant, adapter_name)
        if version is None:
            if not adapter.serving_version:
                raise FakeError("NOT_FOUND", "ADAPTER_NOT_FOUND", f"{adapter.name} has no version in its traffic")
            version = adapter.serving_version.rpartition("/")[2]
        found = self.versions[adapter.name].get(version[:16])
        if found is None or found.state != pb.ADAPTER_VERSION_STATE_READY:
            raise not_found(name)
        return found

    def put_version(
        self, tenant: str, name: str, digest: str, files: list[pb.AdapterFile], labels: dict[str, str]
    ) -> pb.AdapterVersion:
        """Add a version, and its adapter if that is new."""
        full = self.full_name(tenant, name)
        if full not in self.adapters:
            self.adapters[full] = pb.Adapter(name=full, labels=labels, create_time=now())
            self.versions[full] = {}
        version_id = digest[:16]
        if version_id not in self.versions[full]:
            self.versions[full][version_id] = pb.AdapterVersion(
                name=f"{full}/versions/{version_id}",
                digest=digest,
                state=pb.ADAPTER_VERSION_STATE_READY,
                files=files,
                max_rank=8,
                target_modules=["q_proj", "v_proj"],
                slab_units=1,
                create_time=now(),
            )
        self.changed(full)
        return self.versions[full][version_id]

    def finish(self, upload: Upload) -> pb.AdapterVersion:
        """Make a version of an upload."""
        if len(upload.data) != upload.file.size:
            raise FakeError("FAILED_PRECONDITION", "", "the upload is not complete")
        if hashlib.sha256(upload.data).hexdigest() != upload.file.sha256:
            raise invalid("files[0].sha256", "is not the digest of the bytes", "DIGEST_MISMATCH")
        digest = hashlib.sha256()
        files = []
        for file_name, data in (
            ("adapter_config.json", upload.config),
            (TENSOR_FILE, bytes(upload.data)),
            ("loramux_manifest.json", upload.manifest),
        ):
            if data:
                sha = hashlib.sha256(data).hexdigest()
                digest.update(f"{file_name}:{len(data)}:{sha};".encode())
                files.append(pb.AdapterFile(name=file_name, size=len(data), sha256=sha))
        return self.put_version(upload.tenant, upload.adapter, digest.hexdigest(), files, upload.labels)

    def set_traffic(self, adapter: pb.Adapter, targets: list[pb.TrafficTarget]) -> None:
        """Change the traffic of an adapter."""
        resolved = []
        for target in targets:
            version_id = target.version.rpartition("/")[2][:16]
            if version_id not in self.versions[adapter.name]:
                raise not_found(target.version)
            resolved.append(
                pb.TrafficTarget(
                    version=f"{adapter.name}/versions/{version_id}",
                    weight=target.weight if target.HasField("weight") else 1,
                )
            )
        serving = max(resolved, key=lambda target: target.weight).version if resolved else ""
        if serving != adapter.serving_version:
            adapter.previous_version = adapter.serving_version
        adapter.serving_version = serving
        del adapter.traffic[:]
        adapter.traffic.extend(resolved)

    def changed(self, full: str) -> None:
        """Count a change of an adapter and tell the watchers."""
        self.revision += 1
        adapter = self.adapters[full]
        adapter.revision = self.revision
        adapter.etag = f"r{self.revision}"
        adapter.update_time.CopyFrom(now())
        self.tell(pb.WatchAdaptersResponse(changed=self.snapshot(adapter)))

    def tell(self, event: pb.WatchAdaptersResponse) -> None:
        """Send an event to the watchers."""
        event.revision, event.replica_id = self.revision, REPLICA
        for watcher in self.watchers:
            watcher.put_nowait(event)

    def residency(self, version: pb.AdapterVersion) -> pb.AdapterResidency:
        """Tell where a version is."""
        return pb.AdapterResidency(
            version=version.name,
            replica_id=REPLICA,
            level=self.levels.get(version.name, common_pb2.RESIDENCY_LEVEL_STORE),
        )

    def snapshot(self, adapter: pb.Adapter) -> pb.AdapterSnapshot:
        """Describe an adapter for a watcher; a copy, since it is sent later."""
        result = pb.AdapterSnapshot(
            residency=[
                self.residency(version)
                for version in self.versions[adapter.name].values()
                if version.name in self.levels
            ]
        )
        result.adapter.CopyFrom(adapter)
        return result

    def count(self, tenant: str, version: str, input_tokens: int, output_tokens: int) -> None:
        """Add a generation to the usage ledger; an empty version is the base alone."""
        entry = self.usage.setdefault((tenant, version), pb.UsageEntry(version=version))
        entry.requests += 1
        entry.input_tokens += input_tokens
        entry.output_tokens += output_tokens

    def of_tenant(self, tenant: str, prefix: str = "") -> Iterator[pb.Adapter]:
        """Iterate over the adapters of a tenant by name."""
        start = f"tenants/{tenant}/adapters/{prefix}"
        return (adapter for name, adapter in sorted(self.adapters.items()) if name.startswith(start))
