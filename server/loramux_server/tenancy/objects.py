"""Which objects of the store the registry answers for: notes of objects on their way in or out, and drains.

An object is noted before it is placed and until its version is committed, and from the end of its last version until
it has left the store. So whatever a crash leaves behind has a note, and a start removes it.
"""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, and_, delete, exists, insert, select, update

from loramux_server.tenancy import schema
from loramux_server.tenancy.changes import RegistryLimits
from loramux_server.tenancy.reader import RegistryReader
from loramux_server.tenancy.records import VersionState
from loramux_server.tenancy.rows import in_use, one_adapter

_adapters, _versions, _pending = schema.adapters.c, schema.versions.c, schema.pending_objects.c


class RegistryObjects(RegistryReader):
    """The part of `registry.Registry` that the store hangs on.

    Args:
        path: SQLite file; created when missing.
        limits: Bounds a tenant.
        clock: Unix seconds.

    Raises:
        RegistryError: The file cannot be used as a registry.
    """

    def __init__(self, path: Path, *, limits: RegistryLimits, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, clock=clock)
        self._limits = limits

    def begin_object(self, tenant: str, digest: str) -> bool:
        """Note that an object is about to be placed into the store.

        Returns:
            Whether a version that is not deleted uses this object already.
        """
        with self._database.write() as connection:
            _note_object(connection, tenant, digest)
            return in_use(connection, tenant, digest)

    def abandon_object(self, tenant: str, digest: str) -> None:
        """Take a note back: the object is not in the store, or a version uses it."""
        with self._database.write() as connection:
            forget_object(connection, tenant, digest)

    def finish_drain(self, tenant: str, adapter: str, digest: str) -> bool:
        """Turn a DRAINING version into a DELETED one: nothing uses it any more.

        Of a deleted adapter nothing is remembered, of another one the newest deleted versions.

        Returns:
            Whether its object has to leave the store, since no other version of the tenant uses it. It is noted; call
            `abandon_object` when it is gone.
        """
        mine = (_versions.tenant == tenant, _versions.adapter == adapter)
        with self._database.write() as connection:
            connection.execute(
                update(schema.versions)
                .where(*mine, _versions.digest == digest, _versions.state == VersionState.DRAINING)
                .values(state=VersionState.DELETED.value)
            )
            unused = not in_use(connection, tenant, digest)
            if unused:
                _note_object(connection, tenant, digest)
            forgotten = delete(schema.versions).where(*mine, _versions.state == VersionState.DELETED)
            if connection.execute(one_adapter(tenant, adapter)).one_or_none() is not None:
                kept = (
                    select(_versions.digest)
                    .where(*mine, _versions.state == VersionState.DELETED)
                    .order_by(_versions.revision.desc())
                    .limit(self._limits.deleted_versions)
                )
                forgotten = forgotten.where(_versions.digest.not_in(kept))
            connection.execute(forgotten)
            return unused

    def recover(self) -> list[tuple[str, str]]:
        """Settle what the last run left: nothing runs, so every DRAINING version is DELETED.

        Returns:
            (tenant, digest) of objects that are noted and no version uses; remove them, then call `forget_objects`.
        """
        with self._database.write() as connection:
            draining = connection.execute(
                select(_versions.tenant, _versions.digest).where(_versions.state == VersionState.DRAINING)
            ).all()
            connection.execute(
                update(schema.versions)
                .where(_versions.state == VersionState.DRAINING)
                .values(state=VersionState.DELETED.value)
            )
            for tenant, digest in draining:
                _note_object(connection, tenant, digest)
            owner = exists().where(and_(_adapters.tenant == _versions.tenant, _adapters.adapter == _versions.adapter))
            connection.execute(delete(schema.versions).where(_versions.state == VersionState.DELETED, ~owner))
            noted = connection.execute(select(_pending.tenant, _pending.digest)).all()
            return sorted((tenant, digest) for tenant, digest in noted if not in_use(connection, tenant, digest))

    def forget_objects(self) -> None:
        """Clear all notes; for `recover`, after the objects are gone."""
        with self._database.write() as connection:
            connection.execute(delete(schema.pending_objects))


def forget_object(connection: Connection, tenant: str, digest: str) -> None:
    """Take the note of an object back inside a transaction."""
    connection.execute(delete(schema.pending_objects).where(_pending.tenant == tenant, _pending.digest == digest))


def _note_object(connection: Connection, tenant: str, digest: str) -> None:
    forget_object(connection, tenant, digest)
    connection.execute(insert(schema.pending_objects).values(tenant=tenant, digest=digest))
