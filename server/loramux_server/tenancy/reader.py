"""Reads of the registry: one consistent transaction each, and tenants."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from sqlalchemy import func, insert, select, update

from loramux_server.tenancy import idempotency, schema
from loramux_server.tenancy.database import Database
from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import AdapterRecord, AdapterState, FileRecord, VersionRecord, VersionState
from loramux_server.tenancy.rows import adapter_of, require_adapter, require_version, revision_of, tenant_of, version_of
from loramux_server.tenancy.tenants import Tenant, new_salt

_adapters, _versions = schema.adapters.c, schema.versions.c
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that serving needs, read in one transaction."""

    revision: int
    tenants: Mapping[str, Tenant]
    adapters: Mapping[tuple[str, str], AdapterState]


class RegistryReader:
    """The reading half of `registry.Registry`.

    Args:
        path: SQLite file; created when missing.
        clock: Unix seconds.

    Raises:
        RegistryError: The file cannot be used as a registry.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._database = Database(path)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def ensure_tenant(self, name: str) -> Tenant:
        """Return a tenant, made with defaults and a fresh salt when it is new."""
        table = schema.tenants
        with self._database.write() as connection:
            row = connection.execute(select(table).where(table.c.tenant == name)).one_or_none()
            if row is not None:
                return tenant_of(row)
            made = Tenant(name=name, salt=new_salt())
            connection.execute(
                insert(table).values(
                    tenant=name,
                    weight=made.weight,
                    default_adapter=made.default_adapter,
                    allow_base=made.allow_base,
                    salt=made.salt,
                )
            )
            return made

    def configure_tenant(self, name: str, *, weight: float, default_adapter: str | None, allow_base: bool) -> Tenant:
        """Set what an operator decides about a tenant; its salt stays."""
        self.ensure_tenant(name)
        table = schema.tenants
        with self._database.write() as connection:
            connection.execute(
                update(table)
                .where(table.c.tenant == name)
                .values(weight=weight, default_adapter=default_adapter, allow_base=allow_base)
            )
            return tenant_of(connection.execute(select(table).where(table.c.tenant == name)).one())

    def snapshot(self) -> Snapshot:
        """Read everything that serving needs."""
        with self._database.read() as connection:
            held: dict[tuple[str, str], list[VersionRecord]] = {}
            for row in connection.execute(
                select(schema.versions)
                .where(_versions.state != VersionState.DELETED)
                .order_by(_versions.revision.desc())
            ):
                held.setdefault((row.tenant, row.adapter), []).append(version_of(row))
            adapters = {
                (row.tenant, row.adapter): AdapterState(
                    adapter=adapter_of(row), versions=tuple(held.get((row.tenant, row.adapter), ()))
                )
                for row in connection.execute(select(schema.adapters))
            }
            tenants = {row.tenant: tenant_of(row) for row in connection.execute(select(schema.tenants))}
            return Snapshot(revision=revision_of(connection), tenants=tenants, adapters=adapters)

    def get_adapter(self, tenant: str, adapter: str) -> AdapterRecord:
        """Read one adapter.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
        """
        with self._database.read() as connection:
            return require_adapter(connection, tenant, adapter)

    def list_adapters(
        self, tenant: str, *, limit: int, after: str = "", prefix: str = "", labels: Mapping[str, str] | None = None
    ) -> tuple[list[AdapterRecord], int]:
        """Read adapters sorted by name.

        Args:
            tenant: Owner.
            limit: Most records.
            after: Only names greater than this.
            prefix: Only names that start with this.
            labels: Only adapters that have all of these.

        Returns:
            The records and the registry revision that they show.
        """
        wanted = dict(labels or {})
        found: list[AdapterRecord] = []
        with self._database.read() as connection:
            rows = connection.execute(
                select(schema.adapters)
                .where(
                    _adapters.tenant == tenant,
                    _adapters.adapter > after,
                    func.substr(_adapters.adapter, 1, len(prefix)) == prefix,
                )
                .order_by(_adapters.adapter)
            )
            for row in rows:
                record = adapter_of(row)
                if wanted.items() <= record.labels.items():
                    found.append(record)
                    if len(found) == limit:
                        break
            rows.close()
            return found, revision_of(connection)

    def get_version(self, reference: AdapterReference) -> VersionRecord:
        """Read one version in any state.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            InvalidRequest: 16 digits that two versions share.
        """
        with self._database.read() as connection:
            return require_version(connection, reference)

    def list_versions(
        self,
        tenant: str,
        adapter: str,
        *,
        limit: int,
        before: int | None = None,
        states: Sequence[VersionState] = (VersionState.READY, VersionState.DRAINING),
    ) -> tuple[list[VersionRecord], int]:
        """Read versions of one adapter, newest first.

        Args:
            tenant: Owner.
            adapter: {a}.
            limit: Most records.
            before: Only versions created by a smaller revision.
            states: Only versions in one of these.

        Returns:
            The records and the registry revision that they show.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
        """
        with self._database.read() as connection:
            require_adapter(connection, tenant, adapter)
            query = select(schema.versions).where(
                _versions.tenant == tenant, _versions.adapter == adapter, _versions.state.in_(list(states))
            )
            if before is not None:
                query = query.where(_versions.revision < before)
            rows = connection.execute(query.order_by(_versions.revision.desc()).limit(limit))
            return [version_of(row) for row in rows], revision_of(connection)

    def recall(self, key: IdempotencyKey | None, result_type: type[R]) -> R | None:
        """Return the answer that a key already has; None = the mutation has to run.

        Raises:
            InvalidRequest: IDEMPOTENCY_MISMATCH.
        """
        if key is None:
            return None
        with self._database.read() as connection:
            stored = idempotency.recall(connection, key, self._clock())
        return None if stored is None else msgspec.json.decode(stored, type=result_type)

    def claim(self, key: IdempotencyKey) -> None:
        """Bind a key to its payload where the answer itself is kept elsewhere (uploads in progress).

        Raises:
            InvalidRequest: IDEMPOTENCY_MISMATCH.
        """
        now = self._clock()
        with self._database.write() as connection:
            if idempotency.recall(connection, key, now) is None:
                idempotency.remember(connection, key, b"null", now)

    def find_tensors(self, tenant: str, file: FileRecord) -> str | None:
        """Digest of a READY version of the tenant that holds this very tensor file; None = none does."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(schema.versions)
                .where(
                    _versions.tenant == tenant,
                    _versions.tensors_sha256 == file.sha256,
                    _versions.state == VersionState.READY,
                )
                .limit(1)
            )
            return next((row.digest for row in rows if file in version_of(row).files), None)
