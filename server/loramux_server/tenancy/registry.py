"""The registry: tenants, adapters, versions and traffic in SQLite. Its rows are the commit point of every change.

Synchronous and thread-safe; callers on an event loop go through `asyncio.to_thread`. One revision counts the changes of
the whole registry: it only grows, and every adapter carries the revision that changed it last. Mutations return a
`Change` with the new state of the one adapter that they touched.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from sqlalchemy import Connection, delete, func, insert, select, update

from loramux_base.adapter import TENSORS_NAME
from loramux_server.errors import FailedPrecondition, InvalidRequest, Reason
from loramux_server.tenancy import idempotency, schema
from loramux_server.tenancy.changes import Change, Deletion, RegistryLimits
from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import SHORT_DIGITS, AdapterReference
from loramux_server.tenancy.objects import RegistryObjects, forget_object
from loramux_server.tenancy.records import (
    AdapterRecord,
    NewVersion,
    TargetRecord,
    VersionRecord,
    VersionState,
    serving,
)
from loramux_server.tenancy.rows import (
    adapter_of,
    advance_revision,
    check_etag,
    check_quota,
    one_adapter,
    require_adapter,
    require_ready,
    require_version,
    revision_of,
    state_of,
    version_of,
)

_adapters, _versions = schema.adapters.c, schema.versions.c
R = TypeVar("R")


class Registry(RegistryObjects):
    """See the module.

    Args:
        path: SQLite file; created when missing.
        limits: Bounds a tenant.
        clock: Unix seconds.

    Raises:
        RegistryError: The file cannot be used as a registry.
    """

    def __init__(
        self, path: Path, *, limits: RegistryLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(path, limits=limits or RegistryLimits(), clock=clock)

    def commit_version(
        self,
        new: NewVersion,
        *,
        labels: Mapping[str, str] | None = None,
        key: IdempotencyKey | None = None,
    ) -> Change[VersionRecord]:
        """Make a version whose object is in the store READY, and its adapter if that is new.

        Equal bytes give the same version: one that is READY stays as it is, a deleted one comes back.

        Raises:
            ResourceExhausted: TENANT_QUOTA.
            InvalidRequest: The adapter exists with other labels; IDEMPOTENCY_MISMATCH.
        """

        def commit(connection: Connection, now: float) -> VersionRecord:
            forget_object(connection, new.tenant, new.digest)
            where = (
                _versions.tenant == new.tenant,
                _versions.adapter == new.adapter,
                _versions.digest == new.digest,
            )
            self.check_room(new.tenant, new.adapter, new.digest, labels, connection=connection)
            row = connection.execute(select(schema.versions).where(*where)).one_or_none()
            if row is not None and row.state == VersionState.READY:
                return version_of(row)
            revision = advance_revision(connection)
            if connection.execute(one_adapter(new.tenant, new.adapter)).one_or_none() is None:
                connection.execute(
                    insert(schema.adapters).values(
                        tenant=new.tenant,
                        adapter=new.adapter,
                        traffic=msgspec.json.encode(()),
                        previous="",
                        labels=msgspec.json.encode(dict(labels or {})),
                        revision=revision,
                        create_time=now,
                        update_time=now,
                    )
                )
            connection.execute(delete(schema.versions).where(*where))
            connection.execute(
                insert(schema.versions).values(
                    tenant=new.tenant,
                    adapter=new.adapter,
                    digest=new.digest,
                    state=VersionState.READY.value,
                    files=msgspec.json.encode(new.files),
                    tensors_sha256=next((file.sha256 for file in new.files if file.name == TENSORS_NAME), ""),
                    max_rank=new.max_rank,
                    modules=msgspec.json.encode(new.modules),
                    slab_units=new.slab_units,
                    tensor_bytes=new.tensor_bytes,
                    base_fingerprint=new.base_fingerprint,
                    base_verified=new.base_verified,
                    create_time=now,
                    revision=revision,
                )
            )
            return version_of(connection.execute(select(schema.versions).where(*where)).one())

        return self._mutate(new.tenant, new.adapter, key, VersionRecord, commit)

    def check_room(
        self,
        tenant: str,
        adapter: str,
        digest: str | None,
        labels: Mapping[str, str] | None,
        *,
        connection: Connection | None = None,
    ) -> None:
        """Check that a version could be added.

        Args:
            tenant: Owner.
            adapter: {a}.
            digest: Its digest, if known: a version that exists takes no room.
            labels: Labels for a new adapter.
            connection: A transaction to look in; None = a new one.

        Raises:
            ResourceExhausted: TENANT_QUOTA.
            InvalidRequest: The adapter exists with other labels.
        """
        if connection is None:
            with self._database.read() as own:
                return self.check_room(tenant, adapter, digest, labels, connection=own)
        row = connection.execute(one_adapter(tenant, adapter)).one_or_none()
        if row is None:
            held = connection.execute(select(func.count()).where(_adapters.tenant == tenant)).scalar_one()
            check_quota("adapters", held, self._limits.adapters, "delete one first")
            return None
        if labels and dict(labels) != adapter_of(row).labels:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"labels: adapter {adapter!r} exists with other labels; change them by UpdateAdapter",
                field="labels",
            )
        mine = (
            _versions.tenant == tenant,
            _versions.adapter == adapter,
            _versions.state != VersionState.DELETED,
        )
        held = connection.execute(select(func.count()).where(*mine, _versions.digest != (digest or ""))).scalar_one()
        check_quota(f"versions of adapter {adapter!r}", held, self._limits.versions, "delete one first")
        return None

    def update_adapter(
        self,
        tenant: str,
        adapter: str,
        *,
        etag: str = "",
        traffic: Sequence[TargetRecord] | None = None,
        labels: Mapping[str, str] | None = None,
        key: IdempotencyKey | None = None,
    ) -> Change[AdapterRecord]:
        """Change traffic, labels or both of one adapter at once; None leaves a field as it is.

        Raises:
            NotFound: ADAPTER_NOT_FOUND, adapter or a target.
            Conflict: VERSION_CONFLICT, `etag` is not current.
            FailedPrecondition: VERSION_IN_USE, a target is not READY.
            InvalidRequest: IDEMPOTENCY_MISMATCH.
        """

        def commit(connection: Connection, now: float) -> AdapterRecord:
            old = require_adapter(connection, tenant, adapter)
            check_etag(old, etag)
            targets = old.traffic if traffic is None else tuple(traffic)
            for target in targets:
                require_ready(
                    require_version(connection, AdapterReference(tenant=tenant, adapter=adapter, version=target.digest))
                )
            now_serving = serving(targets)
            previous = old.previous
            if now_serving != old.serving:
                candidate = old.serving or old.previous
                previous = candidate if candidate != now_serving else ""
            connection.execute(
                update(schema.adapters)
                .where(_adapters.tenant == tenant, _adapters.adapter == adapter)
                .values(
                    traffic=msgspec.json.encode(targets),
                    previous=previous,
                    labels=msgspec.json.encode(old.labels if labels is None else dict(labels)),
                    revision=advance_revision(connection),
                    update_time=now,
                )
            )
            return require_adapter(connection, tenant, adapter)

        return self._mutate(tenant, adapter, key, AdapterRecord, commit)

    def delete_adapter(
        self, tenant: str, adapter: str, *, etag: str = "", key: IdempotencyKey | None = None
    ) -> Change[Deletion]:
        """Delete an adapter; its versions drain.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            Conflict: VERSION_CONFLICT, `etag` is not current.
            InvalidRequest: IDEMPOTENCY_MISMATCH.
        """

        def commit(connection: Connection, now: float) -> Deletion:
            check_etag(require_adapter(connection, tenant, adapter), etag)
            ready = (
                _versions.tenant == tenant,
                _versions.adapter == adapter,
                _versions.state == VersionState.READY,
            )
            drained = [version_of(row) for row in connection.execute(select(schema.versions).where(*ready))]
            connection.execute(update(schema.versions).where(*ready).values(state=VersionState.DRAINING.value))
            connection.execute(delete(schema.adapters).where(_adapters.tenant == tenant, _adapters.adapter == adapter))
            return Deletion(
                revision=advance_revision(connection),
                versions=tuple(msgspec.structs.replace(version, state=VersionState.DRAINING) for version in drained),
            )

        return self._mutate(tenant, adapter, key, Deletion, commit)

    def delete_version(self, reference: AdapterReference, *, key: IdempotencyKey | None = None) -> Change[Deletion]:
        """Delete one version; it drains. A version that is deleted already stays as it is.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            FailedPrecondition: VERSION_IN_USE, it is in the adapter's traffic.
            InvalidRequest: Ambiguous digits; IDEMPOTENCY_MISMATCH.
        """
        tenant, adapter = reference.tenant, reference.adapter

        def commit(connection: Connection, now: float) -> Deletion:
            owner = require_adapter(connection, tenant, adapter, reference.version)
            version = require_version(connection, reference)
            if version.state is not VersionState.READY:
                return Deletion(revision=revision_of(connection), versions=(version,))
            if any(target.digest == version.digest for target in owner.traffic):
                raise FailedPrecondition(
                    Reason.VERSION_IN_USE,
                    f"version {version.digest[:SHORT_DIGITS]} is in the traffic of adapter {adapter!r}; "
                    "move the traffic to another version first",
                    field="name",
                    metadata={"version": version.name},
                )
            revision = advance_revision(connection)
            connection.execute(
                update(schema.versions)
                .where(
                    _versions.tenant == tenant,
                    _versions.adapter == adapter,
                    _versions.digest == version.digest,
                )
                .values(state=VersionState.DRAINING.value)
            )
            connection.execute(
                update(schema.adapters)
                .where(_adapters.tenant == tenant, _adapters.adapter == adapter)
                .values(
                    previous="" if owner.previous == version.digest else owner.previous,
                    revision=revision,
                    update_time=now,
                )
            )
            return Deletion(
                revision=revision, versions=(msgspec.structs.replace(version, state=VersionState.DRAINING),)
            )

        return self._mutate(tenant, adapter, key, Deletion, commit)

    def check_integrity(self) -> None:
        """Assert the invariants of the whole registry.

        Raises:
            AssertionError: One is broken: a bug of ours.
        """
        with self._database.read() as connection:
            newest = revision_of(connection)
            for row in connection.execute(select(schema.versions)):
                assert 0 < row.revision <= newest, "a version is newer than the registry"
            for row in connection.execute(select(schema.adapters)):
                record = adapter_of(row)
                assert 0 < record.revision <= newest, "an adapter is newer than the registry"
                assert record.previous != record.serving or not record.previous, "previous is the serving version"
                ready = {
                    found.digest
                    for found in connection.execute(
                        select(_versions.digest).where(
                            _versions.tenant == record.tenant,
                            _versions.adapter == record.adapter,
                            _versions.state == VersionState.READY,
                        )
                    )
                }
                digests = [target.digest for target in record.traffic]
                assert len(set(digests)) == len(digests), "a version is twice in the traffic"
                assert ready.issuperset(digests), "traffic goes to a version that is not READY"

    def _mutate(
        self,
        tenant: str,
        adapter: str,
        key: IdempotencyKey | None,
        result_type: type[R],
        commit: Callable[[Connection, float], R],
    ) -> Change[R]:
        """Run a mutation and store its answer under its key in one transaction."""
        now = self._clock()
        with self._database.write() as connection:
            stored = None if key is None else idempotency.recall(connection, key, now)
            result = commit(connection, now) if stored is None else msgspec.json.decode(stored, type=result_type)
            if stored is None and key is not None:
                idempotency.remember(connection, key, msgspec.json.encode(result), now)
            return Change(
                result=result,
                tenant=tenant,
                adapter=adapter,
                state=state_of(connection, tenant, adapter),
                revision=revision_of(connection),
                replayed=stored is not None,
            )
