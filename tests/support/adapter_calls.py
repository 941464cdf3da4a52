"""The adapter service over a real registry and store, and requests to call it with."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from loramux.v1 import adapter_pb2 as pb
from loramux_server.errors import LoramuxServerError, Reason
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.upload_request import UploadLimits
from loramux_server.rpc.adapter_service import SERVICE, AdapterService
from loramux_server.rpc.call import Call
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import CONFIG, FakeEngine, FakeValidator, digest_of

CALL = Call(tenant="default", principal="local", correlation_id="c", deadline=None)
ACME = Call(tenant="acme", principal="local", correlation_id="c", deadline=None)
BOT = "tenants/default/adapters/bot"


class Served:
    """An `AdapterService` and what stands behind it; takes the part of the transport."""

    def __init__(self, root: Path) -> None:
        self.engine = FakeEngine()
        self.validator = FakeValidator()
        self.cycle = AdapterLifecycle(
            Registry(root / "registry.sqlite"),
            LocalStore(root / "store"),
            self.validator,
            self.engine,
            upload_limits=UploadLimits(chunk_bytes=64),
            allow_unverified=True,
            heartbeat=0.05,
        )
        self.service = AdapterService(self.cycle, replica_id="r1")

    async def call(self, request: Any, call: Call = CALL) -> Any:
        """Answer of the method that takes such a request."""
        name = type(request).__name__.removesuffix("Request")
        return await self.service.methods()[f"/{SERVICE}/{name}"].handler(request, call)

    async def refused(self, request: Any, reason: Reason, call: Call = CALL) -> LoramuxServerError:
        """The error of a call that must fail for this reason."""
        with pytest.raises(LoramuxServerError) as caught:
            await self.call(request, call)
        assert caught.value.reason is reason, caught.value.message
        return caught.value

    async def write(self, messages: Iterable[pb.WriteAdapterUploadRequest], call: Call = CALL) -> Any:
        """Stream messages to an upload."""
        return await self.service.WriteAdapterUpload(streamed(messages), call)

    async def upload(self, content: str, adapter: str = "bot", **labels: str) -> pb.AdapterVersion:
        """Upload a version whose bytes are `content`."""
        data = content.encode()
        started = await self.call(start(data, adapter, **labels))
        if started.upload.committed_bytes < len(data):
            await self.write(chunks(started.upload.upload_id, data))
        finished = await self.call(pb.FinishAdapterUploadRequest(upload_id=started.upload.upload_id))
        version: pb.AdapterVersion = finished.version
        return version

    async def move(self, *targets: pb.TrafficTarget, name: str = "bot", **options: Any) -> pb.Adapter:
        """Set the traffic."""
        response = await self.call(update(name, ["traffic"], traffic=targets, **options))
        adapter: pb.Adapter = response.adapter
        return adapter


async def streamed(
    messages: Iterable[pb.WriteAdapterUploadRequest],
) -> AsyncIterator[pb.WriteAdapterUploadRequest]:
    """The messages as the transport would give them."""
    for message in messages:
        yield message


def start(data: bytes, adapter: str = "bot", **labels: str) -> pb.StartAdapterUploadRequest:
    """The request that starts an upload of these tensors."""
    return pb.StartAdapterUploadRequest(
        adapter=adapter,
        adapter_config=CONFIG,
        files=[pb.AdapterFile(name="adapter_model.safetensors", size=len(data), sha256=digest_of(data))],
        labels=labels,
    )


def chunks(upload_id: str, data: bytes, size: int = 64) -> list[pb.WriteAdapterUploadRequest]:
    """The messages of an upload; the first names it."""
    return [
        pb.WriteAdapterUploadRequest(
            upload_id=upload_id if offset == 0 else "", offset=offset, data=data[offset : offset + size]
        )
        for offset in range(0, len(data), size)
    ]


def update(name: str, paths: list[str], etag: str = "", **fields: Any) -> pb.UpdateAdapterRequest:
    """An update whose mask is `paths`."""
    own = {key: fields.pop(key) for key in ("warm", "idempotency_key") if key in fields}
    return pb.UpdateAdapterRequest(
        adapter=pb.Adapter(name=name, etag=etag, **fields), update_mask=FieldMask(paths=paths), **own
    )


def target(content: str, weight: int | None = None) -> pb.TrafficTarget:
    """A target of traffic by content."""
    return pb.TrafficTarget(version=digest_of(content)[:16], weight=weight)


def version_name(content: str, name: str = BOT) -> str:
    """Full name of a version by its content."""
    return f"{name}/versions/{digest_of(content)[:16]}"
