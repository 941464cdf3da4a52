"""Adapters: between records of the registry and messages of `loramux.v1`, with the bounds of what requests carry."""

from collections.abc import Callable, Mapping, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from loramux.v1 import adapter_pb2 as pb
from loramux.v1 import common_pb2
from loramux_server.errors import InvalidRequest, NotServedYet, Reason
from loramux_server.lora import watch
from loramux_server.lora.engine_link import Residency
from loramux_server.lora.upload_session import Upload
from loramux_server.tenancy.names import (
    SHORT_DIGITS,
    AdapterReference,
    check_version,
    echo,
    parse_version,
    shown_version,
    version_name,
)
from loramux_server.tenancy.records import AdapterRecord, AdapterState, FileRecord, VersionRecord, VersionState

MOST_TARGETS = 16
LARGEST_WEIGHT = 10_000
_MOST_ENTRIES = 16

_STATES: "Mapping[VersionState, pb.AdapterVersionState.ValueType]" = {
    VersionState.READY: pb.ADAPTER_VERSION_STATE_READY,
    VersionState.DRAINING: pb.ADAPTER_VERSION_STATE_DRAINING,
    VersionState.DELETED: pb.ADAPTER_VERSION_STATE_DELETED,
}
_LEVELS: "Mapping[str, common_pb2.ResidencyLevel.ValueType]" = {
    "gpu": common_pb2.RESIDENCY_LEVEL_DEVICE,
    "host": common_pb2.RESIDENCY_LEVEL_HOST,
    "store": common_pb2.RESIDENCY_LEVEL_STORE,
}


def timestamp(seconds: float) -> Timestamp:
    """Make a timestamp of Unix seconds."""
    made = Timestamp()
    made.FromMicroseconds(round(seconds * 1e6))
    return made


def adapter_message(record: AdapterRecord) -> pb.Adapter:
    """Make the message of an adapter."""

    def named(digest: str) -> str:
        return version_name(record.tenant, record.adapter, digest) if digest else ""

    return pb.Adapter(
        name=record.name,
        traffic=[pb.TrafficTarget(version=named(target.digest), weight=target.weight) for target in record.traffic],
        serving_version=named(record.serving),
        previous_version=named(record.previous),
        revision=record.revision,
        etag=record.etag,
        labels=record.labels,
        create_time=timestamp(record.create_time),
        update_time=timestamp(record.update_time),
    )


def residency_message(residency: Residency, replica_id: str, device_bytes: int) -> pb.AdapterResidency:
    """Make the message of a residency.

    Args:
        residency: Where a version is.
        replica_id: On which replica.
        device_bytes: What it takes there when it is on the device.
    """
    level = _LEVELS[residency.level]
    message = pb.AdapterResidency(
        version=shown_version(residency.key),
        replica_id=replica_id,
        level=level,
        references=residency.references,
        device_bytes=device_bytes if level == common_pb2.RESIDENCY_LEVEL_DEVICE else 0,
    )
    if residency.last_used is not None:
        message.last_used_time.CopyFrom(timestamp(residency.last_used))
    return message


def version_message(record: VersionRecord, residency: Residency, replica_id: str) -> pb.AdapterVersion:
    """Make the message of a version, with its residency unless it is deleted."""
    message = pb.AdapterVersion(
        name=record.name,
        digest=record.digest,
        state=_STATES[record.state],
        files=[pb.AdapterFile(name=file.name, size=file.size, sha256=file.sha256) for file in record.files],
        max_rank=record.max_rank,
        target_modules=record.modules,
        slab_units=record.slab_units,
        base_fingerprint=record.base_fingerprint,
        create_time=timestamp(record.create_time),
    )
    if record.state is not VersionState.DELETED:
        message.residency.CopyFrom(residency_message(residency, replica_id, record.tensor_bytes))
    return message


def upload_message(upload: Upload, adapter_name: str, replica_id: str) -> pb.AdapterUpload:
    """Make the message of an upload."""
    return pb.AdapterUpload(
        upload_id=upload.upload_id,
        adapter=adapter_name,
        committed_bytes=upload.committed_bytes,
        total_bytes=upload.total_bytes,
        expire_time=timestamp(upload.expire_time),
        replica_id=replica_id,
    )


def file_records(files: Sequence[pb.AdapterFile]) -> tuple[FileRecord, ...]:
    """Take the files of a request; their names and digests are checked by `check_upload_request`.

    Raises:
        InvalidRequest: There are far too many.
    """
    _check_count("files", len(files), "list exactly adapter_model.safetensors")
    return tuple(FileRecord(name=file.name, size=file.size, sha256=file.sha256) for file in files)


def version_states(states: "Sequence[pb.AdapterVersionState.ValueType]") -> tuple[VersionState, ...]:
    """Take the states of a filter; none means all but DELETED. VALIDATING and FAILED match nothing that is listed.

    Raises:
        InvalidRequest: A state is unknown.
    """
    _check_count("states", len(states), f"name each of the states once, {_MOST_ENTRIES} at most")
    if not states:
        return (VersionState.READY, VersionState.DRAINING)
    known = set(pb.AdapterVersionState.values()) - {pb.ADAPTER_VERSION_STATE_UNSPECIFIED}
    for index, state in enumerate(states):
        if state not in known:
            field = f"states[{index}]"
            raise InvalidRequest(Reason.INVALID_PARAMETER, f"{field}: {state} is no state of a version", field=field)
    wanted = set(states)
    return tuple(state for state, value in _STATES.items() if value in wanted)


def update_fields(paths: Sequence[str]) -> frozenset[str]:
    """Check the field mask of an update.

    Raises:
        InvalidRequest: It is empty or names a field that cannot be set.
        NotServedYet: It names `pin`.
    """
    if not paths:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER, "update_mask is empty; name traffic, labels or both", field="update_mask"
        )
    _check_count("update_mask", len(paths), "name traffic, labels or both")
    for path in paths:
        if path == "pin":
            raise not_served("UpdateAdapter with update_mask 'pin'", "update_mask")
        if path not in ("traffic", "labels"):
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"update_mask: {echo(path)} cannot be set; name traffic, labels or both",
                field="update_mask",
            )
    return frozenset(paths)


def traffic_targets(
    targets: Sequence[pb.TrafficTarget], adapter: AdapterReference
) -> list[tuple[AdapterReference, int]]:
    """Take the targets of an update: versions of `adapter` and weights.

    Raises:
        InvalidRequest: Too many targets, a weight out of range, or a name that is no version.
    """
    if len(targets) > MOST_TARGETS:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"adapter.traffic has {len(targets)} targets; the limit is {MOST_TARGETS}",
            field="adapter.traffic",
        )
    taken: list[tuple[AdapterReference, int]] = []
    for index, target in enumerate(targets):
        field = f"adapter.traffic[{index}]"
        weight = target.weight if target.HasField("weight") else 1
        if not 1 <= weight <= LARGEST_WEIGHT:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"{field}.weight is {weight}; use 1 to {LARGEST_WEIGHT}, or leave the target out",
                field=f"{field}.weight",
            )
        taken.append((target_version(target.version, adapter, f"{field}.version"), weight))
    return taken


def target_version(text: str, adapter: AdapterReference, field: str) -> AdapterReference:
    """Take `{v}`, `{a}@{v}` or the full name of a version.

    Raises:
        InvalidRequest: It is none of them.
    """
    if "/" in text or "@" in text:
        return parse_version(text, adapter.tenant, field)
    return AdapterReference(
        tenant=adapter.tenant, adapter=adapter.adapter, version=check_version(text[: 4 * SHORT_DIGITS + 1], field)
    )


def watch_message(
    event: watch.WatchEvent,
    replica_id: str,
    name_of: Callable[[str], str],
    residency_of: Callable[[AdapterState], Sequence[Residency]],
) -> pb.WatchAdaptersResponse:
    """Make the message of an event of a watch.

    Args:
        event: What happened.
        replica_id: Who answers.
        name_of: Full name of an adapter by its {a}.
        residency_of: Where the versions of an adapter are.
    """

    def snapshot(state: AdapterState) -> pb.AdapterSnapshot:
        bytes_of = {version.key: version.tensor_bytes for version in state.versions}
        return pb.AdapterSnapshot(
            adapter=adapter_message(state.adapter),
            residency=[
                residency_message(residency, replica_id, bytes_of[residency.key]) for residency in residency_of(state)
            ],
        )

    message = pb.WatchAdaptersResponse(revision=event.revision, replica_id=replica_id)
    match event:
        case watch.SnapshotEntry(state=state):
            message.snapshot.CopyFrom(snapshot(state))
        case watch.SnapshotEnd(adapters=adapters):
            message.snapshot_complete.adapters = adapters
            message.snapshot_complete.SetInParent()
        case watch.Changed(state=state):
            message.changed.CopyFrom(snapshot(state))
        case watch.Deleted(adapter=adapter):
            message.deleted.name = name_of(adapter)
        case watch.Beat():
            message.heartbeat.SetInParent()
    return message


def _check_count(field: str, count: int, way_out: str) -> None:
    """Bound a list before anything is made of its entries."""
    if count > _MOST_ENTRIES:
        raise InvalidRequest(Reason.INVALID_PARAMETER, f"{field} has {count} entries; {way_out}", field=field)


def not_served(what: str, field: str | None = None) -> NotServedYet:
    """The error for a part of the API that this server does not serve yet."""
    return NotServedYet(Reason.NOT_SERVED_YET, f"{what} is not served yet by this server", field=field)
