"""Rows of the registry: how they become records, and the look-ups and checks that every transaction shares."""

from typing import Any

import msgspec
from sqlalchemy import Connection, Row, Select, func, select, update

from loramux_server.errors import Conflict, FailedPrecondition, InvalidRequest, Reason, ResourceExhausted
from loramux_server.tenancy import schema
from loramux_server.tenancy.names import SHORT_DIGITS, AdapterReference, adapter_not_found
from loramux_server.tenancy.records import (
    AdapterRecord,
    AdapterState,
    FileRecord,
    TargetRecord,
    VersionRecord,
    VersionState,
)
from loramux_server.tenancy.tenants import Tenant

_adapters, _versions = schema.adapters.c, schema.versions.c


def require_ready(version: VersionRecord) -> VersionRecord:
    """Return a version that can serve.

    Raises:
        FailedPrecondition: VERSION_IN_USE, it is being deleted.
        NotFound: ADAPTER_NOT_FOUND, it is deleted.
    """
    if version.state is VersionState.DELETED:
        raise adapter_not_found(reference_to(version))
    if version.state is VersionState.DRAINING:
        raise FailedPrecondition(
            Reason.VERSION_IN_USE,
            f"version {version.digest[:SHORT_DIGITS]} of adapter {version.adapter!r} is being deleted; "
            "upload it again to bring it back",
            metadata={"version": version.name},
        )
    return version


def ambiguous(reference: AdapterReference) -> InvalidRequest:
    """The error for 16 digits that several versions of one adapter share."""
    return InvalidRequest(
        Reason.INVALID_PARAMETER,
        f"version {reference.version} of adapter {reference.adapter!r} is ambiguous; give all 64 digits",
    )


def reference_to(version: VersionRecord) -> AdapterReference:
    """Name a version the way a caller would."""
    return AdapterReference(tenant=version.tenant, adapter=version.adapter, version=version.digest[:SHORT_DIGITS])


def check_quota(what: str, held: int, limit: int, way_out: str) -> None:
    """Check a count against its limit.

    Raises:
        ResourceExhausted: TENANT_QUOTA.
    """
    if held >= limit:
        raise ResourceExhausted(
            Reason.TENANT_QUOTA,
            f"the tenant has {held} {what}, the limit is {limit}; {way_out}",
            metadata={"quota": what.partition(" ")[0], "limit": str(limit)},
        )


def check_etag(record: AdapterRecord, etag: str) -> None:
    """Check that a caller's etag, unless empty, is the current one.

    Raises:
        Conflict: VERSION_CONFLICT.
    """
    if etag and etag != record.etag:
        raise Conflict(
            Reason.VERSION_CONFLICT,
            f"adapter {record.adapter!r} has changed since that etag (it is at revision {record.revision}); "
            "read it again and retry with its new etag",
            field="etag",
            metadata={"revision": str(record.revision)},
        )


def one_adapter(tenant: str, adapter: str) -> Select[Any]:
    """Query of one adapter's row."""
    return select(schema.adapters).where(_adapters.tenant == tenant, _adapters.adapter == adapter)


def require_adapter(connection: Connection, tenant: str, adapter: str, version: str | None = None) -> AdapterRecord:
    """Read an adapter; `version` only completes the name in the error.

    Raises:
        NotFound: ADAPTER_NOT_FOUND.
    """
    row = connection.execute(one_adapter(tenant, adapter)).one_or_none()
    if row is None:
        raise adapter_not_found(AdapterReference(tenant=tenant, adapter=adapter, version=version))
    return adapter_of(row)


def require_version(connection: Connection, reference: AdapterReference) -> VersionRecord:
    """Read a version by 16 or 64 digits, in any state.

    Raises:
        NotFound: ADAPTER_NOT_FOUND.
        InvalidRequest: Two versions share the 16 digits.
    """
    assert reference.version is not None, "a version is required"
    rows = connection.execute(
        select(schema.versions)
        .where(
            _versions.tenant == reference.tenant,
            _versions.adapter == reference.adapter,
            func.substr(_versions.digest, 1, len(reference.version)) == reference.version,
        )
        .limit(2)
    ).all()
    match rows:
        case []:
            raise adapter_not_found(reference)
        case [row]:
            return version_of(row)
        case _:
            raise ambiguous(reference)


def state_of(connection: Connection, tenant: str, adapter: str) -> AdapterState | None:
    """Read an adapter with its versions that are not DELETED; None = there is no such adapter."""
    row = connection.execute(one_adapter(tenant, adapter)).one_or_none()
    if row is None:
        return None
    rows = connection.execute(
        select(schema.versions)
        .where(_versions.tenant == tenant, _versions.adapter == adapter, _versions.state != VersionState.DELETED)
        .order_by(_versions.revision.desc())
    )
    return AdapterState(adapter=adapter_of(row), versions=tuple(version_of(found) for found in rows))


def in_use(connection: Connection, tenant: str, digest: str) -> bool:
    """Whether a version that is not deleted uses an object."""
    query = select(func.count()).where(
        _versions.tenant == tenant, _versions.digest == digest, _versions.state != VersionState.DELETED
    )
    return connection.execute(query).scalar_one() > 0


def revision_of(connection: Connection) -> int:
    """Read the registry's revision."""
    return int(connection.execute(select(schema.state.c.revision)).scalar_one())


def advance_revision(connection: Connection) -> int:
    """Take the next revision."""
    connection.execute(update(schema.state).values(revision=schema.state.c.revision + 1))
    return revision_of(connection)


def tenant_of(row: Row[Any]) -> Tenant:
    """Make a record of a row."""
    return Tenant(
        name=row.tenant,
        weight=row.weight,
        default_adapter=row.default_adapter,
        allow_base=row.allow_base,
        salt=bytes(row.salt),
    )


def adapter_of(row: Row[Any]) -> AdapterRecord:
    """Make a record of a row."""
    return AdapterRecord(
        tenant=row.tenant,
        adapter=row.adapter,
        traffic=msgspec.json.decode(row.traffic, type=tuple[TargetRecord, ...]),
        previous=row.previous,
        labels=msgspec.json.decode(row.labels, type=dict[str, str]),
        revision=row.revision,
        create_time=row.create_time,
        update_time=row.update_time,
    )


def version_of(row: Row[Any]) -> VersionRecord:
    """Make a record of a row."""
    return VersionRecord(
        tenant=row.tenant,
        adapter=row.adapter,
        digest=row.digest,
        state=VersionState(row.state),
        files=msgspec.json.decode(row.files, type=tuple[FileRecord, ...]),
        max_rank=row.max_rank,
        modules=msgspec.json.decode(row.modules, type=tuple[str, ...]),
        slab_units=row.slab_units,
        tensor_bytes=row.tensor_bytes,
        base_fingerprint=row.base_fingerprint,
        base_verified=row.base_verified,
        create_time=row.create_time,
        revision=row.revision,
    )
