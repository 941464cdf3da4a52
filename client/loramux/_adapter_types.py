"""Values of the adapter calls."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from loramux._errors import LoramuxError


class VersionState(enum.StrEnum):
    """Life of an adapter version."""

    VALIDATING = "validating"
    READY = "ready"
    FAILED = "failed"
    DRAINING = "draining"
    DELETED = "deleted"
    UNKNOWN = "unknown"
    """A state that this version of the SDK does not know."""


class ResidencyLevel(enum.StrEnum):
    """Where the tensors of a version are on one replica, from far to near."""

    STORE = "store"
    HOST = "host"
    DEVICE = "device"
    UNKNOWN = "unknown"
    """A level that this version of the SDK does not know."""


class AdapterEventKind(enum.StrEnum):
    """What an event of a watch tells."""

    SNAPSHOT = "snapshot"
    """An adapter as it was when the watch began."""
    SNAPSHOT_COMPLETE = "snapshot_complete"
    """Every adapter has been sent; changes follow."""
    CHANGED = "changed"
    """An adapter was created or changed, or moved between residency levels."""
    DELETED = "deleted"
    """An adapter was deleted, or its grant was taken back."""
    HEARTBEAT = "heartbeat"
    """Nothing happened for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficTarget:
    """A share of an adapter's traffic.

    Attributes:
        version: Full name of the version.
        weight: Share, relative to the sum of all weights, 1 to 10,000.
    """

    version: str
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPin:
    """A promise to keep a version resident.

    Attributes:
        version: Full name of the version.
        expire_time: When the pin ends by itself (UTC); None if it does not.
    """

    version: str
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A named adapter: an alias that points at immutable versions.

    Attributes:
        name: Full name, `tenants/{t}/adapters/{a}`.
        traffic: Versions that requests without a version get, by weight.
        serving_version: Full name of the version with the largest weight; None if no version serves.
        previous_version: Where a rollback goes; None if the serving version never changed.
        revision: Registry revision of its last change.
        etag: Changes with every change; given back, it guards against concurrent ones.
        labels: Labels of the owner.
        pin: The version that is kept resident; None if none is.
        create_time: When it was created (UTC).
        update_time: When it last changed (UTC).
        raw: The protobuf message, for those who need it.
    """

    name: str
    traffic: tuple[TrafficTarget, ...]
    serving_version: str | None
    previous_version: str | None
    revision: int
    etag: str
    labels: Mapping[str, str]
    pin: AdapterPin | None
    create_time: datetime
    update_time: datetime
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """A file of an adapter version.

    Attributes:
        name: Plain file name.
        size: Size in bytes.
        sha256: 64 hexadecimal digits.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterResidency:
    """Where a version is on one replica.

    Attributes:
        version: Full name of the version.
        replica_id: The replica.
        level: Nearest place.
        references: Requests that use it at the moment.
        pinned: Whether a pin keeps it there.
        device_bytes: Bytes that it holds on the device.
        last_used_time: When a request last used it there (UTC); None for never.
    """

    version: str
    replica_id: str
    level: ResidencyLevel
    references: int
    pinned: bool
    device_bytes: int
    last_used_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion:
    """An immutable version of an adapter.

    Attributes:
        name: Full name, `tenants/{t}/adapters/{a}/versions/{v}`.
        digest: sha256 of the content, 64 hexadecimal digits.
        state: Where it is in its life.
        failure: Why it was refused; None if it was not.
        files: Its files, by name.
        max_rank: Largest rank of any module.
        target_modules: Modules that it changes.
        slab_units: Rank units (16 rows) of the device slab that it needs.
        base_fingerprint: Fingerprint of the base that it was trained on; empty if it came without a manifest.
        create_time: When it was created (UTC).
        residency: Where it is on the replica that answered; None if not told.
        raw: The protobuf message, for those who need it.
    """

    name: str
    digest: str
    state: VersionState
    failure: LoramuxError | None
    files: tuple[AdapterFile, ...]
    max_rank: int
    target_modules: tuple[str, ...]
    slab_units: int
    base_fingerprint: str
    create_time: datetime
    residency: AdapterResidency | None
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEvent:
    """One event of a watch.

    Attributes:
        kind: What it tells.
        revision: Registry revision of the event; never smaller than that of the event before.
        replica_id: Replica that answers.
        name: Full name of the adapter; empty for events about none.
        adapter: State of the adapter, for a snapshot or a change.
        residency: Its versions on the replica that answers, for a snapshot or a change.
        raw: The protobuf message, for those who need it.
    """

    kind: AdapterEventKind
    revision: int
    replica_id: str
    name: str = ""
    adapter: Adapter | None = None
    residency: tuple[AdapterResidency, ...] = ()
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Leave for another tenant to use an adapter.

    Attributes:
        name: Full name, `tenants/{t}/adapters/{a}/grants/{grantee}`.
        adapter: Full name of the adapter.
        grantee: Id of the tenant that may use it.
        create_time: When it was made (UTC).
    """

    name: str
    adapter: str
    grantee: str
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEntry:
    """What one adapter version was used for.

    Attributes:
        version: Full name of the version; empty for the base alone.
        requests: Requests that started, cancelled and failed ones included.
        input_tokens: Prompt tokens, cached ones included.
        cached_tokens: Prompt tokens from the prefix cache.
        output_tokens: Generated tokens.
    """

    version: str
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
