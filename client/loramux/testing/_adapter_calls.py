"""Adapter calls of the fake server."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import Message

from loramux.testing._registry import REPLICA, TENSOR_FILE, Registry, Upload, invalid, not_found, now
from loramux.testing._script import FakeError
from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2

T = TypeVar("T")
R = TypeVar("R", bound=Message)


def page(items: Sequence[T], size: int, token: str) -> tuple[Sequence[T], str]:
    """Return a page of a list and the token of the next one."""
    if not 1 <= size <= 1000:
        raise invalid("page_size", f"is {size}; it must be 1 to 1,000")
    start = int(token) if token.isdecimal() else 0
    end = start + size
    return items[start:end], str(end) if end < len(items) else ""


class AdapterCalls:
    """Handlers of AdapterService; each takes the tenant and the request.

    Args:
        registry: The state.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.break_upload_at: int | None = None

    def _once(self, tenant: str, method: str, request: Message, key: str, make: Callable[[], R]) -> R:
        """Run a change once for each idempotency key."""
        if not key:
            return make()
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        known = self._registry.answers.get((tenant, method, key))
        if known is None:
            answer = make()
            self._registry.answers[tenant, method, key] = (digest, answer)
            return answer
        if known[0] != digest:
            raise invalid("idempotency_key", "was used for another request", "IDEMPOTENCY_MISMATCH")
        answer_again: R = known[1]  # type: ignore[assignment]  # the key holds the method, hence the type
        return answer_again

    async def start(self, tenant: str, request: pb.StartAdapterUploadRequest) -> pb.StartAdapterUploadResponse:
        """Open an upload."""
        full = self._registry.full_name(tenant, request.adapter)
        if len(request.files) != 1 or request.files[0].name != TENSOR_FILE:
            raise invalid("files", f"must be exactly {TENSOR_FILE}")
        if not request.adapter_config:
            raise invalid("adapter_config", "is empty")
        for known in self._registry.uploads.values():
            if known.tenant == tenant and known.adapter == full and known.file == request.files[0]:
                return pb.StartAdapterUploadResponse(upload=known.message())
        upload = Upload(
            upload_id=uuid.uuid4().hex,
            tenant=tenant,
            adapter=full,
            config=request.adapter_config,
            manifest=request.manifest,
            file=request.files[0],
            labels=dict(request.labels),
        )
        self._registry.uploads[upload.upload_id] = upload
        return pb.StartAdapterUploadResponse(upload=upload.message())

    def _upload(self, tenant: str, upload_id: str) -> Upload:
        """Return an upload of the tenant."""
        upload = self._registry.uploads.get(upload_id)
        if upload is None or upload.tenant != tenant:
            raise FakeError("NOT_FOUND", "UPLOAD_NOT_FOUND", f"there is no upload {upload_id!r}")
        return upload

    async def write(
        self, tenant: str, requests: AsyncIterator[pb.WriteAdapterUploadRequest]
    ) -> pb.WriteAdapterUploadResponse:
        """Take bytes; the stream is read to its end before a refusal, as on a real server."""
        upload: Upload | None = None
        refusal: FakeError | None = None
        async for request in requests:
            if refusal is not None:
                continue
            try:
                upload = upload or self._upload(tenant, request.upload_id)
                self._append(upload, request)
            except FakeError as error:
                if error.code == "UNAVAILABLE":
                    raise
                refusal = error
        if refusal is not None:
            raise refusal
        if upload is None:
            raise invalid("upload_id", "is empty")
        return pb.WriteAdapterUploadResponse(upload=upload.message())

    def _append(self, upload: Upload, request: pb.WriteAdapterUploadRequest) -> None:
        """Take one message."""
        if not 1 <= len(request.data) <= 1024 * 1024:
            raise invalid("data", "must have 1 byte to 1 MiB")
        if request.offset != len(upload.data):
            raise invalid("offset", f"is {request.offset}; the upload is at {len(upload.data)}")
        upload.data += request.data
        if self.break_upload_at is not None and len(upload.data) >= self.break_upload_at:
            self.break_upload_at = None
            raise FakeError("UNAVAILABLE", "", "scripted break of the upload")

    async def get_upload(self, tenant: str, request: pb.GetAdapterUploadRequest) -> pb.GetAdapterUploadResponse:
        """Describe an upload."""
        return pb.GetAdapterUploadResponse(upload=self._upload(tenant, request.upload_id).message())

    async def finish(self, tenant: str, request: pb.FinishAdapterUploadRequest) -> pb.FinishAdapterUploadResponse:
        """Make a version of an upload."""

        def make() -> pb.FinishAdapterUploadResponse:
            version = self._registry.finish(self._upload(tenant, request.upload_id))
            del self._registry.uploads[request.upload_id]
            return pb.FinishAdapterUploadResponse(version=version, revision=self._registry.revision)

        return self._once(tenant, "FinishAdapterUpload", request, request.idempotency_key, make)

    async def get(self, tenant: str, request: pb.GetAdapterRequest) -> pb.GetAdapterResponse:
        """Describe an adapter."""
        return pb.GetAdapterResponse(adapter=self._registry.adapter(tenant, request.name))

    async def list(self, tenant: str, request: pb.ListAdaptersRequest) -> pb.ListAdaptersResponse:
        """List adapters."""
        wanted = request.labels.items()
        found = [
            adapter
            for adapter in self._registry.of_tenant(tenant, request.name_prefix)
            if all(adapter.labels.get(key) == value for key, value in wanted)
        ]
        size = request.page_size if request.HasField("page_size") else 100
        items, token = page(found, size, request.page_token)
        return pb.ListAdaptersResponse(adapters=items, next_page_token=token, revision=self._registry.revision)

    async def get_version(self, tenant: str, request: pb.GetAdapterVersionRequest) -> pb.GetAdapterVersionResponse:
        """Describe a version."""
        adapter, version = self._registry.split(request.name)
        if version is None:
            raise invalid("name", "has no version")
        found = self._registry.versions[self._registry.adapter(tenant, adapter).name].get(version[:16])
        if found is None:
            raise not_found(request.name)
        return pb.GetAdapterVersionResponse(version=found)

    async def list_versions(
        self, tenant: str, request: pb.ListAdapterVersionsRequest
    ) -> pb.ListAdapterVersionsResponse:
        """List versions, newest first."""
        adapter = self._registry.adapter(tenant, request.adapter)
        deleted = pb.ADAPTER_VERSION_STATE_DELETED
        found = [
            version
            for version in reversed(self._registry.versions[adapter.name].values())
            if (version.state in request.states if request.states else version.state != deleted)
        ]
        size = request.page_size if request.HasField("page_size") else 100
        items, token = page(found, size, request.page_token)
        return pb.ListAdapterVersionsResponse(versions=items, next_page_token=token, revision=self._registry.revision)

    async def update(self, tenant: str, request: pb.UpdateAdapterRequest) -> pb.UpdateAdapterResponse:
        """Change an adapter."""

        def make() -> pb.UpdateAdapterResponse:
            adapter = self._registry.adapter(tenant, request.adapter.name)
            if request.adapter.etag and request.adapter.etag != adapter.etag:
                raise FakeError("ABORTED", "VERSION_CONFLICT", "the adapter has changed: read it again")
            paths = list(request.update_mask.paths)
            if not paths or set(paths) - {"traffic", "labels", "pin"}:
                raise invalid("update_mask", "must name traffic, labels or pin")
            if "traffic" in paths:
                self._registry.set_traffic(adapter, list(request.adapter.traffic))
                if request.warm or not request.HasField("warm"):
                    for target in adapter.traffic:
                        self._registry.levels[target.version] = common_pb2.RESIDENCY_LEVEL_DEVICE
            if "labels" in paths:
                adapter.labels.clear()
                adapter.labels.update(request.adapter.labels)
            if "pin" in paths:
                self._pin(tenant, adapter, request)
            self._registry.changed(adapter.name)
            response = pb.UpdateAdapterResponse()
            response.adapter.CopyFrom(adapter)
            return response

        return self._once(tenant, "UpdateAdapter", request, request.idempotency_key, make)

    def _pin(self, tenant: str, adapter: pb.Adapter, request: pb.UpdateAdapterRequest) -> None:
        """Set or clear the pin."""
        if not request.adapter.HasField("pin"):
            adapter.ClearField("pin")
            return
        wanted = request.adapter.pin.version.rpartition("/")[2]
        name = adapter.name if not wanted else f"{adapter.name}/versions/{wanted}"
        version = self._registry.version(tenant, name)
        adapter.pin.CopyFrom(request.adapter.pin)
        adapter.pin.version = version.name

    async def delete(self, tenant: str, request: pb.DeleteAdapterRequest) -> pb.DeleteAdapterResponse:
        """Delete an adapter."""

        def make() -> pb.DeleteAdapterResponse:
            adapter = self._registry.adapter(tenant, request.name)
            if request.etag and request.etag != adapter.etag:
                raise FakeError("ABORTED", "VERSION_CONFLICT", "the adapter has changed: read it again")
            name = adapter.name
            del self._registry.adapters[name], self._registry.versions[name]
            self._registry.revision += 1
            self._registry.tell(pb.WatchAdaptersResponse(deleted=pb.AdapterDeleted(name=name)))
            return pb.DeleteAdapterResponse(revision=self._registry.revision)

        return self._once(tenant, "DeleteAdapter", request, request.idempotency_key, make)

    async def delete_version(
        self, tenant: str, request: pb.DeleteAdapterVersionRequest
    ) -> pb.DeleteAdapterVersionResponse:
        """Delete a version."""

        def make() -> pb.DeleteAdapterVersionResponse:
            version = self._registry.version(tenant, request.name)
            adapter = self._registry.adapter(tenant, version.name.partition("/versions/")[0])
            if any(target.version == version.name for target in adapter.traffic):
                raise FakeError("FAILED_PRECONDITION", "VERSION_IN_USE", "the version is in the adapter's traffic")
            version.state = pb.ADAPTER_VERSION_STATE_DELETED
            self._registry.changed(adapter.name)
            return pb.DeleteAdapterVersionResponse(version=version, revision=self._registry.revision)

        return self._once(tenant, "DeleteAdapterVersion", request, request.idempotency_key, make)

    async def preload(self, tenant: str, request: pb.PreloadAdapterRequest) -> pb.PreloadAdapterResponse:
        """Make a version resident."""
        version = self._registry.version(tenant, request.name)
        level = request.level if request.HasField("level") else common_pb2.RESIDENCY_LEVEL_DEVICE
        self._registry.levels[version.name] = level
        return pb.PreloadAdapterResponse(residency=[self._registry.residency(version)])

    async def unload(self, tenant: str, request: pb.UnloadAdapterRequest) -> pb.UnloadAdapterResponse:
        """Give up the residency of a version."""
        version = self._registry.version(tenant, request.name)
        self._registry.levels.pop(version.name, None)
        return pb.UnloadAdapterResponse(residency=[self._registry.residency(version)])

    async def watch(
        self, tenant: str, request: pb.WatchAdaptersRequest
    ) -> AsyncGenerator[pb.WatchAdaptersResponse, None]:
        """Send a snapshot, then changes."""
        changes: asyncio.Queue[pb.WatchAdaptersResponse] = asyncio.Queue()
        self._registry.watchers.add(changes)
        try:
            revision = self._registry.revision
            start = f"tenants/{tenant}/adapters/{request.name_prefix}"
            snapshots = [self._registry.snapshot(a) for a in self._registry.of_tenant(tenant, request.name_prefix)]
            for snapshot in snapshots:
                yield pb.WatchAdaptersResponse(revision=revision, replica_id=REPLICA, snapshot=snapshot)
            yield pb.WatchAdaptersResponse(
                revision=revision, replica_id=REPLICA, snapshot_complete=pb.SnapshotComplete(adapters=len(snapshots))
            )
            while True:
                event = await changes.get()
                if (event.deleted.name or event.changed.adapter.name).startswith(start):
                    yield event
        finally:
            self._registry.watchers.discard(changes)

    async def create_grant(self, tenant: str, request: pb.CreateGrantRequest) -> pb.CreateGrantResponse:
        """Make a grant."""
        adapter = self._registry.adapter(tenant, request.adapter)
        name = f"{adapter.name}/grants/{request.grantee}"
        grant = self._registry.grants.setdefault(
            name, pb.Grant(name=name, adapter=adapter.name, grantee=request.grantee, create_time=now())
        )
        self._registry.revision += 1
        return pb.CreateGrantResponse(grant=grant, revision=self._registry.revision)

    async def list_grants(self, tenant: str, request: pb.ListGrantsRequest) -> pb.ListGrantsResponse:
        """List grants."""
        wanted = self._registry.adapter(tenant, request.adapter).name if request.adapter else ""
        found = [
            grant
            for name, grant in sorted(self._registry.grants.items())
            if name.startswith(f"tenants/{tenant}/") and wanted in ("", grant.adapter)
        ]
        size = request.page_size if request.HasField("page_size") else 100
        items, token = page(found, size, request.page_token)
        return pb.ListGrantsResponse(grants=items, next_page_token=token)

    async def delete_grant(self, tenant: str, request: pb.DeleteGrantRequest) -> pb.DeleteGrantResponse:
        """Take a grant back."""
        if not request.name.startswith(f"tenants/{tenant}/") or request.name not in self._registry.grants:
            raise not_found(request.name)
        del self._registry.grants[request.name]
        self._registry.revision += 1
        return pb.DeleteGrantResponse(revision=self._registry.revision)

    async def usage(self, tenant: str, request: pb.GetTenantUsageRequest) -> pb.GetTenantUsageResponse:
        """Read the usage ledger; the span is not looked at."""
        wanted = self._registry.full_name(tenant, request.adapter) if request.adapter else ""
        found = [
            entry
            for (owner, version), entry in sorted(self._registry.usage.items())
            if owner == tenant and version.startswith(wanted)
        ]
        size = request.page_size if request.HasField("page_size") else 100
        items, token = page(found, size, request.page_token)
        return pb.GetTenantUsageResponse(entries=items, next_page_token=token)
