"""From the messages of the adapter calls to the SDK's values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from loramux._adapter_types import (
    Adapter,
    AdapterEvent,
    AdapterEventKind,
    AdapterFile,
    AdapterPin,
    AdapterResidency,
    AdapterVersion,
    Grant,
    ResidencyLevel,
    TrafficTarget,
    UsageEntry,
    VersionState,
)
from loramux._status import error_from_status
from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2

_STATES: Mapping[int, VersionState] = {
    pb.ADAPTER_VERSION_STATE_VALIDATING: VersionState.VALIDATING,
    pb.ADAPTER_VERSION_STATE_READY: VersionState.READY,
    pb.ADAPTER_VERSION_STATE_FAILED: VersionState.FAILED,
    pb.ADAPTER_VERSION_STATE_DRAINING: VersionState.DRAINING,
    pb.ADAPTER_VERSION_STATE_DELETED: VersionState.DELETED,
}
_LEVELS: Mapping[int, ResidencyLevel] = {
    common_pb2.RESIDENCY_LEVEL_STORE: ResidencyLevel.STORE,
    common_pb2.RESIDENCY_LEVEL_HOST: ResidencyLevel.HOST,
    common_pb2.RESIDENCY_LEVEL_DEVICE: ResidencyLevel.DEVICE,
}


def _time(value: Timestamp) -> datetime:
    """Convert a moment to UTC."""
    return value.ToDatetime(tzinfo=UTC)


def adapter(value: pb.Adapter) -> Adapter:
    """Convert an adapter."""
    pin: AdapterPin | None = None
    if value.HasField("pin"):
        expire = value.pin.expire_time if value.pin.HasField("expire_time") else None
        pin = AdapterPin(version=value.pin.version, expire_time=None if expire is None else _time(expire))
    return Adapter(
        name=value.name,
        traffic=tuple(
            TrafficTarget(version=target.version, weight=target.weight if target.HasField("weight") else 1)
            for target in value.traffic
        ),
        serving_version=value.serving_version or None,
        previous_version=value.previous_version or None,
        revision=value.revision,
        etag=value.etag,
        labels=dict(value.labels),
        pin=pin,
        create_time=_time(value.create_time),
        update_time=_time(value.update_time),
        raw=value,
    )


def residency(value: pb.AdapterResidency) -> AdapterResidency:
    """Convert where a version is."""
    return AdapterResidency(
        version=value.version,
        replica_id=value.replica_id,
        level=_LEVELS.get(value.level, ResidencyLevel.UNKNOWN),
        references=value.references,
        pinned=value.pinned,
        device_bytes=value.device_bytes,
        last_used_time=_time(value.last_used_time) if value.HasField("last_used_time") else None,
    )


def version(value: pb.AdapterVersion) -> AdapterVersion:
    """Convert a version."""
    return AdapterVersion(
        name=value.name,
        digest=value.digest,
        state=_STATES.get(value.state, VersionState.UNKNOWN),
        failure=error_from_status(value.failure) if value.HasField("failure") else None,
        files=tuple(AdapterFile(name=file.name, size=file.size, sha256=file.sha256) for file in value.files),
        max_rank=value.max_rank,
        target_modules=tuple(value.target_modules),
        slab_units=value.slab_units,
        base_fingerprint=value.base_fingerprint,
        create_time=_time(value.create_time),
        residency=residency(value.residency) if value.HasField("residency") else None,
        raw=value,
    )


def watch_event(value: pb.WatchAdaptersResponse) -> AdapterEvent | None:
    """Convert an event of a watch; None for one that this version does not know."""
    kind = value.WhichOneof("event")
    if kind == "snapshot" or kind == "changed":
        state = value.snapshot if kind == "snapshot" else value.changed
        return AdapterEvent(
            kind=AdapterEventKind(kind),
            revision=value.revision,
            replica_id=value.replica_id,
            name=state.adapter.name,
            adapter=adapter(state.adapter),
            residency=tuple(residency(entry) for entry in state.residency),
            raw=value,
        )
    if kind is None:
        return None
    return AdapterEvent(
        kind=AdapterEventKind(kind),
        revision=value.revision,
        replica_id=value.replica_id,
        name=value.deleted.name if kind == "deleted" else "",
        raw=value,
    )


def grant(value: pb.Grant) -> Grant:
    """Convert a grant."""
    return Grant(name=value.name, adapter=value.adapter, grantee=value.grantee, create_time=_time(value.create_time))


def usage_entry(value: pb.UsageEntry) -> UsageEntry:
    """Convert an entry of the ledger."""
    return UsageEntry(
        version=value.version,
        requests=value.requests,
        input_tokens=value.input_tokens,
        cached_tokens=value.cached_tokens,
        output_tokens=value.output_tokens,
    )
