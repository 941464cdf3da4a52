"""From the SDK's values to the messages of the adapter calls."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from google.protobuf.field_mask_pb2 import FieldMask

from loramux._adapter_types import Adapter, AdapterVersion, ResidencyLevel, VersionState
from loramux._errors import Conflict
from loramux._requests import build, invalid
from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2

_LEVELS = {
    ResidencyLevel.HOST: common_pb2.RESIDENCY_LEVEL_HOST,
    ResidencyLevel.DEVICE: common_pb2.RESIDENCY_LEVEL_DEVICE,
}
_STATES = {
    VersionState.VALIDATING: pb.ADAPTER_VERSION_STATE_VALIDATING,
    VersionState.READY: pb.ADAPTER_VERSION_STATE_READY,
    VersionState.FAILED: pb.ADAPTER_VERSION_STATE_FAILED,
    VersionState.DRAINING: pb.ADAPTER_VERSION_STATE_DRAINING,
    VersionState.DELETED: pb.ADAPTER_VERSION_STATE_DELETED,
}


def idempotency_key() -> str:
    """Mint the key that makes the tries of one mutation one mutation."""
    return uuid.uuid4().hex


def version_id(version: str | AdapterVersion) -> str:
    """Return `{v}` or the full name of a version; `{a}@{v}` is cut to `{v}`."""
    name = version.name if isinstance(version, AdapterVersion) else version
    if not name:
        raise invalid("version", "is empty")
    return name.rpartition("@")[2]


def version_name(adapter: str, version: str | AdapterVersion) -> str:
    """Return a name of the version that stands by itself."""
    name = version_id(version)
    if name.startswith("tenants/"):
        return name
    return f"{adapter}/versions/{name}" if adapter.startswith("tenants/") else f"{adapter}@{name}"


def named(adapter: str) -> str:
    """Refuse an empty adapter name, which would mean something else to the server."""
    if not adapter:
        raise invalid("name", "is empty")
    return adapter


def traffic_update(
    name: str, traffic: Mapping[str, int] | Sequence[tuple[str | AdapterVersion, int]], *, warm: bool, etag: str | None
) -> pb.UpdateAdapterRequest:
    """Build the change of an adapter's traffic."""
    pairs = list(traffic.items()) if isinstance(traffic, Mapping) else list(traffic)

    def make() -> pb.UpdateAdapterRequest:
        targets = [pb.TrafficTarget(version=version_id(version), weight=weight) for version, weight in pairs]
        return pb.UpdateAdapterRequest(
            adapter=pb.Adapter(name=named(name), traffic=targets, etag=etag or ""),
            update_mask=FieldMask(paths=["traffic"]),
            warm=warm,
            idempotency_key=idempotency_key(),
        )

    return build("traffic", make)


def rollback_update(adapter: Adapter, *, warm: bool) -> pb.UpdateAdapterRequest:
    """Build the change that goes back to the previous version, guarded by the etag that was read.

    Raises:
        Conflict: The adapter has no previous version.
    """
    if adapter.previous_version is None:
        raise Conflict(f"{adapter.name} has no previous version to roll back to", code="FAILED_PRECONDITION")
    return traffic_update(adapter.name, [(adapter.previous_version, 1)], warm=warm, etag=adapter.etag)


def labels_update(name: str, labels: Mapping[str, str], *, etag: str | None) -> pb.UpdateAdapterRequest:
    """Build the change of an adapter's labels."""
    return build(
        "labels",
        lambda: pb.UpdateAdapterRequest(
            adapter=pb.Adapter(name=named(name), labels=dict(labels), etag=etag or ""),
            update_mask=FieldMask(paths=["labels"]),
            idempotency_key=idempotency_key(),
        ),
    )


def pin_update(
    name: str, version: str | AdapterVersion | None, expire_time: datetime | None, *, etag: str | None
) -> pb.UpdateAdapterRequest:
    """Build the change that pins a version.

    Raises:
        InvalidRequest: `expire_time` has no time zone.
    """
    request = unpin_update(name, etag=etag)
    request.adapter.pin.version = "" if version is None else version_id(version)
    if expire_time is not None:
        if expire_time.tzinfo is None:
            raise invalid(
                "expire_time", "has no time zone; give one, for example datetime.now(UTC) + timedelta(hours=1)"
            )
        request.adapter.pin.expire_time.FromDatetime(expire_time.astimezone(UTC))
    return request


def unpin_update(name: str, *, etag: str | None) -> pb.UpdateAdapterRequest:
    """Build the change that takes a pin away."""
    return pb.UpdateAdapterRequest(
        adapter=pb.Adapter(name=named(name), etag=etag or ""),
        update_mask=FieldMask(paths=["pin"]),
        idempotency_key=idempotency_key(),
    )


def list_request(
    *, prefix: str, labels: Mapping[str, str] | None, include_granted: bool, page_size: int
) -> pb.ListAdaptersRequest:
    """Build the request of a page of adapters."""
    return build(
        "page_size",
        lambda: pb.ListAdaptersRequest(
            name_prefix=prefix, labels=dict(labels or {}), include_granted=include_granted, page_size=page_size
        ),
    )


def versions_request(name: str, *, states: Sequence[VersionState], page_size: int) -> pb.ListAdapterVersionsRequest:
    """Build the request of a page of versions."""
    for state in states:
        if state not in _STATES:
            raise invalid("states", f"has {state!r}; it must be one of {', '.join(_STATES)}")
    return build(
        "page_size",
        lambda: pb.ListAdapterVersionsRequest(
            adapter=named(name), states=[_STATES[state] for state in states], page_size=page_size
        ),
    )


def grants_request(name: str, *, page_size: int) -> pb.ListGrantsRequest:
    """Build the request of a page of grants."""
    return build("page_size", lambda: pb.ListGrantsRequest(adapter=name, page_size=page_size))


def preload_request(name: str, level: ResidencyLevel) -> pb.PreloadAdapterRequest:
    """Build the request to make an adapter resident."""
    if level not in _LEVELS:
        raise invalid("level", f"is {level!r}; it must be ResidencyLevel.DEVICE or ResidencyLevel.HOST")
    return pb.PreloadAdapterRequest(name=named(name), level=_LEVELS[level])


def usage_request(
    start: datetime | None, end: datetime | None, *, adapter: str, page_size: int
) -> pb.GetTenantUsageRequest:
    """Build the request of a page of the usage ledger."""
    request = build("page_size", lambda: pb.GetTenantUsageRequest(adapter=adapter, page_size=page_size))
    for name, moment, target in (("start", start, request.start_time), ("end", end, request.end_time)):
        if moment is not None:
            if moment.tzinfo is None:
                raise invalid(name, "has no time zone; use datetime.now(UTC) and the like")
            target.FromDatetime(moment.astimezone(UTC))
    return request
