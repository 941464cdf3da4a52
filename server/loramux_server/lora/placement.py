"""Objects of the store and rows of the registry, kept in step; everything here blocks.

The row is the commit point. An object is noted in the registry before it is placed and until it has a row, and from the
end of its last row until it is gone: `recover` settles what a crash left at any line of this file.
"""

import logging

from loramux_server.errors import LoramuxServerError, Unavailable
from loramux_server.lora.upload_session import UploadSession, ValidatedAdapter
from loramux_server.tenancy.changes import Change
from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import split_version_key
from loramux_server.tenancy.records import NewVersion, VersionRecord
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore

_log = logging.getLogger(__name__)


def commit_upload(
    registry: Registry,
    store: LocalStore,
    session: UploadSession,
    validated: ValidatedAdapter,
    key: IdempotencyKey | None,
) -> Change[VersionRecord]:
    """Place the directory of an upload into the store, then commit its version.

    Raises:
        LoramuxServerError: TENANT_QUOTA, INVALID_PARAMETER, STORE_UNAVAILABLE; the upload is as it was before.
    """
    tenant, adapter, digest = session.tenant, session.request.adapter, validated.digest
    files = session.file_records()
    labels = session.request.labels
    registry.check_room(tenant, adapter, digest, labels)
    in_use = registry.begin_object(tenant, digest)
    try:
        store.place(tenant, digest, session.directory, in_use=in_use)
        change = registry.commit_version(
            NewVersion(
                tenant=tenant,
                adapter=adapter,
                digest=digest,
                files=files,
                max_rank=validated.rank,
                modules=tuple(validated.modules),
                slab_units=validated.rank_units,
                tensor_bytes=validated.tensor_bytes,
                base_fingerprint=validated.base_fingerprint,
                base_verified=validated.base_verified,
            ),
            labels=labels,
            key=key,
        )
    except LoramuxServerError:
        # The client may finish again, so the bytes go back to where its upload has them.
        if not in_use:
            store.take_back(tenant, digest, session.directory)
        registry.abandon_object(tenant, digest)
        raise
    try:
        store.discard_upload(session.directory)
    except Unavailable:
        # Committed is committed: the change must reach table and engine whatever becomes of the left-overs.
        _log.warning("a finished upload stays in the store until the next start", exc_info=True)
    return change


def remove_drained(registry: Registry, store: LocalStore, key: str) -> None:
    """End a version that nothing uses any more; its object goes with the last version that has it.

    Raises:
        Unavailable: STORE_UNAVAILABLE; the next start does what is left.
    """
    tenant, adapter, digest = split_version_key(key)
    if registry.finish_drain(tenant, adapter, digest):
        store.remove(tenant, digest)
        registry.abandon_object(tenant, digest)


def recover(registry: Registry, store: LocalStore) -> None:
    """Settle what the last run left; before anything is served.

    Raises:
        Unavailable: STORE_UNAVAILABLE.
    """
    for tenant, digest in registry.recover():
        store.remove(tenant, digest)
    registry.forget_objects()
