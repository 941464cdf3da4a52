"""`loramux.v1.AdapterService`: takes requests apart, asks the life of adapters, puts answers together."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2
from loramux_server.errors import InvalidRequest, Reason
from loramux_server.lora.adapter_table import check_owner
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.upload_request import check_labels, check_upload_request
from loramux_server.lora.upload_session import Upload
from loramux_server.rpc import adapter_messages as messages
from loramux_server.rpc.call import Call, Method
from loramux_server.rpc.limits import MAX_MESSAGE_BYTES
from loramux_server.tenancy.idempotency import IdempotencyKey, check_key
from loramux_server.tenancy.names import AdapterReference, adapter_name, parse_adapter, parse_reference, parse_version
from loramux_server.tenancy.paging import check_page_size, make_token, read_number, read_token
from loramux_server.tenancy.records import VersionRecord

SERVICE = "loramux.v1.AdapterService"
_LONGEST_PREFIX = 63


class AdapterService:
    """The servicer; see the .proto for what each RPC does. Handlers raise `LoramuxServerError`.

    Args:
        lifecycle: Started already; not owned.
        replica_id: Goes into answers that speak of this replica.
    """

    def __init__(self, lifecycle: AdapterLifecycle, *, replica_id: str) -> None:
        self._lifecycle = lifecycle
        self._replica_id = replica_id

    def methods(self) -> Mapping[str, Method]:
        """List the handlers by full method name."""
        unary: dict[str, tuple[type[Message], Callable[[Any, Call], Any]]] = {
            "GetAdapterUpload": (pb.GetAdapterUploadRequest, self.GetAdapterUpload),
            "FinishAdapterUpload": (pb.FinishAdapterUploadRequest, self.FinishAdapterUpload),
            "GetAdapter": (pb.GetAdapterRequest, self.GetAdapter),
            "ListAdapters": (pb.ListAdaptersRequest, self.ListAdapters),
            "GetAdapterVersion": (pb.GetAdapterVersionRequest, self.GetAdapterVersion),
            "ListAdapterVersions": (pb.ListAdapterVersionsRequest, self.ListAdapterVersions),
            "UpdateAdapter": (pb.UpdateAdapterRequest, self.UpdateAdapter),
            "DeleteAdapter": (pb.DeleteAdapterRequest, self.DeleteAdapter),
            "DeleteAdapterVersion": (pb.DeleteAdapterVersionRequest, self.DeleteAdapterVersion),
            "PreloadAdapter": (pb.PreloadAdapterRequest, self.PreloadAdapter),
            "UnloadAdapter": (pb.UnloadAdapterRequest, self.UnloadAdapter),
            "CreateGrant": (pb.CreateGrantRequest, self.CreateGrant),
            "ListGrants": (pb.ListGrantsRequest, self.ListGrants),
            "DeleteGrant": (pb.DeleteGrantRequest, self.DeleteGrant),
            "GetTenantUsage": (pb.GetTenantUsageRequest, self.GetTenantUsage),
        }
        return {
            **{
                f"/{SERVICE}/{name}": Method(request_type=request_type, handler=handler, kind="unary_unary")
                for name, (request_type, handler) in unary.items()
            },
            f"/{SERVICE}/StartAdapterUpload": Method(
                request_type=pb.StartAdapterUploadRequest,
                handler=self.StartAdapterUpload,
                kind="unary_unary",
                max_bytes=2 * 1024 * 1024,
            ),
            f"/{SERVICE}/WriteAdapterUpload": Method(
                request_type=pb.WriteAdapterUploadRequest,
                handler=self.WriteAdapterUpload,
                kind="stream_unary",
                max_bytes=MAX_MESSAGE_BYTES,
            ),
            f"/{SERVICE}/WatchAdapters": Method(
                request_type=pb.WatchAdaptersRequest, handler=self.WatchAdapters, kind="unary_stream"
            ),
        }

    # --- uploads ---------------------------------------------------------------------------------------------------

    async def StartAdapterUpload(
        self, request: pb.StartAdapterUploadRequest, call: Call
    ) -> pb.StartAdapterUploadResponse:
        """Open or resume an upload."""
        reference = _own_adapter(request.adapter, call, "adapter")
        check_labels(request.labels, "labels")
        checked = check_upload_request(
            adapter=reference.adapter,
            config=request.adapter_config,
            manifest=request.manifest if request.HasField("manifest") else None,
            files=messages.file_records(request.files),
            labels=dict(request.labels),
            limits=self._lifecycle.upload_limits,
            allow_unverified=self._lifecycle.allow_unverified,
        )
        upload = await self._lifecycle.start_upload(call.tenant, checked, key=_key(request, call))
        return pb.StartAdapterUploadResponse(upload=self._upload(upload))

    async def WriteAdapterUpload(
        self, requests: AsyncIterator[pb.WriteAdapterUploadRequest], call: Call
    ) -> pb.WriteAdapterUploadResponse:
        """Take the bytes of an upload.

        The pipeline reads what is left of the stream when this refuses: a status that comes while the client still
        writes reaches it as an internal error of the transport.
        """
        upload: Upload | None = None
        upload_id = ""
        async for request in requests:
            if not upload_id:
                upload_id = request.upload_id
            elif request.upload_id not in ("", upload_id):
                raise InvalidRequest(Reason.INVALID_PARAMETER, "upload_id changes within the stream", field="upload_id")
            upload = await self._lifecycle.write_upload(call.tenant, upload_id, request.offset, request.data)
        if upload is None:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                "the stream has no message; send upload_id, offset and data",
                field="upload_id",
            )
        return pb.WriteAdapterUploadResponse(upload=self._upload(upload))

    async def GetAdapterUpload(self, request: pb.GetAdapterUploadRequest, call: Call) -> pb.GetAdapterUploadResponse:
        """Tell how many bytes are committed."""
        upload = await self._lifecycle.get_upload(call.tenant, request.upload_id)
        return pb.GetAdapterUploadResponse(upload=self._upload(upload))

    async def FinishAdapterUpload(
        self, request: pb.FinishAdapterUploadRequest, call: Call
    ) -> pb.FinishAdapterUploadResponse:
        """Validate an upload and make a version of it."""
        version = await self._lifecycle.finish_upload(call.tenant, request.upload_id, key=_key(request, call))
        return pb.FinishAdapterUploadResponse(version=self._version(version), revision=version.revision)

    # --- reads -----------------------------------------------------------------------------------------------------

    async def GetAdapter(self, request: pb.GetAdapterRequest, call: Call) -> pb.GetAdapterResponse:
        """Read one adapter."""
        state = self._lifecycle.table.state_of(call.tenant, _own_adapter(request.name, call, "name"))
        return pb.GetAdapterResponse(adapter=messages.adapter_message(state.adapter))

    async def ListAdapters(self, request: pb.ListAdaptersRequest, call: Call) -> pb.ListAdaptersResponse:
        """Read a page of adapters."""
        if request.include_granted:
            raise messages.not_served("ListAdapters with include_granted", "include_granted")
        _check_prefix(request.name_prefix)
        check_labels(request.labels, "labels")
        labels = dict(request.labels)
        size = check_page_size(request.page_size if request.HasField("page_size") else None)
        query = ("ListAdapters", call.tenant, request.name_prefix, *(f"{k}={v}" for k, v in sorted(labels.items())))
        records, revision = await asyncio.to_thread(
            self._lifecycle.registry.list_adapters,
            call.tenant,
            limit=size + 1,
            after=read_token(request.page_token, query) or "",
            prefix=request.name_prefix,
            labels=labels,
        )
        page = records[:size]
        return pb.ListAdaptersResponse(
            adapters=[messages.adapter_message(record) for record in page],
            next_page_token=make_token(query, page[-1].adapter) if len(records) > size else "",
            revision=revision,
        )

    async def GetAdapterVersion(self, request: pb.GetAdapterVersionRequest, call: Call) -> pb.GetAdapterVersionResponse:
        """Read one version."""
        reference = parse_version(request.name, call.tenant, "name")
        check_owner(call.tenant, reference)
        version = await asyncio.to_thread(self._lifecycle.registry.get_version, reference)
        return pb.GetAdapterVersionResponse(version=self._version(version))

    async def ListAdapterVersions(
        self, request: pb.ListAdapterVersionsRequest, call: Call
    ) -> pb.ListAdapterVersionsResponse:
        """Read a page of versions."""
        reference = _own_adapter(request.adapter, call, "adapter")
        states = messages.version_states(request.states)
        size = check_page_size(request.page_size if request.HasField("page_size") else None)
        query = ("ListAdapterVersions", call.tenant, reference.adapter, *states)
        records, revision = await asyncio.to_thread(
            self._lifecycle.registry.list_versions,
            call.tenant,
            reference.adapter,
            limit=size + 1,
            before=read_number(request.page_token, query),
            states=states,
        )
        page = records[:size]
        return pb.ListAdapterVersionsResponse(
            versions=[self._version(record) for record in page],
            next_page_token=make_token(query, str(page[-1].revision)) if len(records) > size else "",
            revision=revision,
        )

    async def WatchAdapters(
        self, request: pb.WatchAdaptersRequest, call: Call
    ) -> AsyncIterator[pb.WatchAdaptersResponse]:
        """Stream the adapters of the tenant."""
        if request.include_granted:
            raise messages.not_served("WatchAdapters with include_granted", "include_granted")
        _check_prefix(request.name_prefix)
        table = self._lifecycle.table
        async with aclosing(self._lifecycle.watches.watch(call.tenant, request.name_prefix)) as events:
            async for event in events:
                yield messages.watch_message(
                    event,
                    self._replica_id,
                    lambda adapter: adapter_name(call.tenant, adapter),
                    table.resident_versions,
                )

    # --- changes ---------------------------------------------------------------------------------------------------

    async def UpdateAdapter(self, request: pb.UpdateAdapterRequest, call: Call) -> pb.UpdateAdapterResponse:
        """Change traffic, labels or both."""
        fields = messages.update_fields(request.update_mask.paths)
        reference = _own_adapter(request.adapter.name, call, "adapter.name")
        labels = None
        if "labels" in fields:
            check_labels(request.adapter.labels, "adapter.labels")
            labels = dict(request.adapter.labels)
        record = await self._lifecycle.update(
            call.tenant,
            reference,
            etag=request.adapter.etag,
            traffic=messages.traffic_targets(request.adapter.traffic, reference) if "traffic" in fields else None,
            labels=labels,
            warm=request.warm if request.HasField("warm") else True,
            key=_key(request, call),
        )
        return pb.UpdateAdapterResponse(adapter=messages.adapter_message(record))

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, call: Call) -> pb.DeleteAdapterResponse:
        """Delete an adapter."""
        reference = _own_adapter(request.name, call, "name")
        deletion = await self._lifecycle.delete_adapter(
            call.tenant, reference, etag=request.etag, key=_key(request, call)
        )
        return pb.DeleteAdapterResponse(revision=deletion.revision)

    async def DeleteAdapterVersion(
        self, request: pb.DeleteAdapterVersionRequest, call: Call
    ) -> pb.DeleteAdapterVersionResponse:
        """Delete a version."""
        reference = parse_version(request.name, call.tenant, "name")
        deletion = await self._lifecycle.delete_version(call.tenant, reference, key=_key(request, call))
        (version,) = deletion.versions
        return pb.DeleteAdapterVersionResponse(version=self._version(version), revision=deletion.revision)

    async def PreloadAdapter(self, request: pb.PreloadAdapterRequest, call: Call) -> pb.PreloadAdapterResponse:
        """Make versions resident."""
        level = request.level if request.HasField("level") else common_pb2.RESIDENCY_LEVEL_DEVICE
        if level == common_pb2.RESIDENCY_LEVEL_HOST:
            raise messages.not_served("PreloadAdapter with level HOST", "level")
        if level != common_pb2.RESIDENCY_LEVEL_DEVICE:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER, f"level is {level}; use DEVICE, or leave it out", field="level"
            )
        reference = parse_reference(request.name, call.tenant, "name")
        versions, seconds = await self._lifecycle.preload(call.tenant, reference)
        load_time = Duration()
        load_time.FromTimedelta(timedelta(seconds=seconds))
        return pb.PreloadAdapterResponse(
            residency=[self._residency(version) for version in versions], load_time=load_time
        )

    async def UnloadAdapter(self, request: pb.UnloadAdapterRequest, call: Call) -> pb.UnloadAdapterResponse:
        """Give up residency."""
        reference = parse_reference(request.name, call.tenant, "name")
        versions = await self._lifecycle.unload(call.tenant, reference)
        return pb.UnloadAdapterResponse(residency=[self._residency(version) for version in versions])

    # --- not served yet --------------------------------------------------------------------------------------------

    async def CreateGrant(self, request: pb.CreateGrantRequest, call: Call) -> pb.CreateGrantResponse:
        """Refuse: not served yet."""
        raise messages.not_served("CreateGrant")

    async def ListGrants(self, request: pb.ListGrantsRequest, call: Call) -> pb.ListGrantsResponse:
        """Refuse: not served yet."""
        raise messages.not_served("ListGrants")

    async def DeleteGrant(self, request: pb.DeleteGrantRequest, call: Call) -> pb.DeleteGrantResponse:
        """Refuse: not served yet."""
        raise messages.not_served("DeleteGrant")

    async def GetTenantUsage(self, request: pb.GetTenantUsageRequest, call: Call) -> pb.GetTenantUsageResponse:
        """Refuse: not served yet."""
        raise messages.not_served("GetTenantUsage")

    # --- internals -------------------------------------------------------------------------------------------------

    def _upload(self, upload: Upload) -> pb.AdapterUpload:
        return messages.upload_message(upload, adapter_name(upload.tenant, upload.adapter), self._replica_id)

    def _version(self, version: VersionRecord) -> pb.AdapterVersion:
        return messages.version_message(version, self._lifecycle.table.residency(version.key), self._replica_id)

    def _residency(self, version: VersionRecord) -> pb.AdapterResidency:
        residency = self._lifecycle.table.residency(version.key)
        return messages.residency_message(residency, self._replica_id, version.tensor_bytes)


def _own_adapter(text: str, call: Call, field: str) -> AdapterReference:
    """Parse the name of an adapter that must be the acted-for tenant's."""
    reference = parse_adapter(text, call.tenant, field)
    check_owner(call.tenant, reference)
    return reference


def _check_prefix(prefix: str) -> None:
    if len(prefix) > _LONGEST_PREFIX:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"name_prefix has {len(prefix)} characters; a name has at most {_LONGEST_PREFIX}",
            field="name_prefix",
        )


def _key(request: Message, call: Call) -> IdempotencyKey | None:
    """Take the idempotency key of a mutation; the method is that of its request's type."""
    if not request.HasField("idempotency_key"):
        return None
    return IdempotencyKey(
        tenant=call.tenant,
        method=request.DESCRIPTOR.name.removesuffix("Request"),
        key=check_key(str(request.idempotency_key)),  # type: ignore[attr-defined]
        payload_hash=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
    )
