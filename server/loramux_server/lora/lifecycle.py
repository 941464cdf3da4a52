"""The life of adapters on this replica: registry, store, uploads, engine and watches kept in step.

A change is committed in the registry first; then, in order of revision, the snapshot that requests are resolved from,
the engine's table and the watches follow. Without an engine changes commit all the same: `engine_state` brings the next
engine process to the registry's state. Everything here runs on the event loop; what blocks goes to threads.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loramux_server.engine.messages import Command, VersionState
from loramux_server.errors import InvalidRequest, LoramuxServerError, Reason, Unavailable
from loramux_server.lora import placement
from loramux_server.lora.adapter_table import AdapterTable, check_owner, ready_version
from loramux_server.lora.engine_link import EngineLink
from loramux_server.lora.upload_request import UploadLimits, UploadRequest
from loramux_server.lora.upload_session import Upload, UploadSession, ValidatedAdapter
from loramux_server.lora.uploads import AdapterValidator, UploadSessions
from loramux_server.lora.watch import HEARTBEAT_SECONDS, WatchHub
from loramux_server.tenancy.changes import Change, Deletion
from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import (
    AdapterRecord,
    AdapterState,
    FileRecord,
    TargetRecord,
    VersionRecord,
)
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from loramux_server.tenancy.tenants import DEFAULT_TENANT

_log = logging.getLogger(__name__)
R = TypeVar("R")
_SWEEP_SECONDS = 60.0


class AdapterLifecycle:
    """See the module. Call `start` before anything else and `close` at the end.

    Args:
        registry: Owned: closed by `close`.
        store: Owned: closed by `close`.
        validator: Checks uploads; not owned.
        engine: Not owned.
        upload_limits: Bounds of uploads.
        allow_unverified: Take adapters without a manifest.
        clock: Unix seconds.
        heartbeat: Seconds between the signs of life of a quiet watch.
        unload_wait: Seconds that `unload` waits for the engine.
    """

    def __init__(
        self,
        registry: Registry,
        store: LocalStore,
        validator: AdapterValidator,
        engine: EngineLink,
        *,
        upload_limits: UploadLimits | None = None,
        allow_unverified: bool = False,
        clock: Callable[[], float] = time.time,
        heartbeat: float = HEARTBEAT_SECONDS,
        unload_wait: float = 1.0,
    ) -> None:
        self._unload_wait = unload_wait
        self.registry = registry
        self.upload_limits = upload_limits or UploadLimits()
        self.allow_unverified = allow_unverified
        self._store = store
        self._engine = engine
        self._uploads = UploadSessions(
            store, validator, limits=self.upload_limits, find_tensors=self._find_tensors, clock=clock
        )
        self._order = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unloading: dict[str, asyncio.Task[None]] = {}
        self.watches = WatchHub(lambda: self.table.adapters, lambda: self.table.revision, heartbeat=heartbeat)
        self.table = AdapterTable(engine, store.path, self.watches.publish, clock=clock)

    async def start(self) -> None:
        """Settle what the last run left and read the snapshot."""
        await asyncio.to_thread(placement.recover, self.registry, self._store)
        await asyncio.to_thread(self.registry.ensure_tenant, DEFAULT_TENANT)
        self.table.load(await asyncio.to_thread(self.registry.snapshot))
        self._spawn(self._sweep())

    async def close(self) -> None:
        """End uploads and background work, let running commits end, close registry and store."""
        async with self._order:
            await self._uploads.close()
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.registry.close)
        self._store.close()

    @property
    def revision(self) -> int:
        """Newest registry revision that this replica serves."""
        return self.table.revision

    # --- the engine ------------------------------------------------------------------------------------------------

    def engine_state(self) -> list[Command]:
        """Commands for a fresh engine process; send them before any other, without an await in between.

        Nothing of an older process runs any more, so every draining version is done.
        """
        for key in sorted(self.table.draining):
            self._spawn(self._finish_drain(key))
        self.table.forget_residency()
        return self.table.commands()

    def engine_lost(self) -> None:
        """Forget where versions were in an engine process that ended."""
        self.table.forget_residency()

    def on_version_state(self, event: VersionState) -> None:
        """Take in an engine event: residency, and the end of a drain."""
        self.table.on_version_state(event)
        if event.dropped and event.version in self.table.draining:
            self._spawn(self._finish_drain(event.version))

    # --- residency -------------------------------------------------------------------------------------------------

    async def preload(self, tenant: str, reference: AdapterReference) -> tuple[list[VersionRecord], float]:
        """Make a version, or all versions in an adapter's traffic, resident.

        Returns:
            The versions and the seconds it took.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            LoramuxServerError: ENGINE_UNAVAILABLE, or why a version does not fit.
        """
        state = self.table.state_of(tenant, reference)
        if reference.version is None:
            wanted = {target.digest for target in state.adapter.traffic}
            versions = [version for version in state.versions if version.digest in wanted]
        else:
            versions = [ready_version(state, reference)]
        begun = time.monotonic()
        for version in versions:
            await self._preload(version.key)
        return versions, time.monotonic() - begun

    async def unload(self, tenant: str, reference: AdapterReference) -> list[VersionRecord]:
        """Give up the residency of a version, or of all versions of an adapter.

        Rows that running requests hold go when those have ended; that is not waited for longer than `unload_wait`.

        Returns:
            The versions that were resident.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            LoramuxServerError: ENGINE_UNAVAILABLE.
        """
        state = self.table.state_of(tenant, reference)
        versions = list(state.versions) if reference.version is None else [ready_version(state, reference)]
        resident = [version for version in versions if self.table.is_resident(version.key)]
        work = [self._begin_unload(version.key) for version in resident]
        if work:
            done, _ = await asyncio.wait(work, timeout=self._unload_wait)
            for task in done:
                task.result()
        return resident

    # --- changes ---------------------------------------------------------------------------------------------------

    async def update(
        self,
        tenant: str,
        reference: AdapterReference,
        *,
        etag: str = "",
        traffic: Sequence[tuple[AdapterReference, int]] | None = None,
        labels: Mapping[str, str] | None = None,
        warm: bool = True,
        key: IdempotencyKey | None = None,
    ) -> AdapterRecord:
        """Change traffic, labels or both; with `warm`, versions that enter the traffic are made resident before.

        Without an engine the change commits all the same.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            Conflict: VERSION_CONFLICT.
            LoramuxServerError: A target is not READY, does not fit, or the registry is away.
        """
        check_owner(tenant, reference)
        if key is not None:
            replayed = await asyncio.to_thread(self.registry.recall, key, AdapterRecord)
            if replayed is not None:
                return replayed
        state = self.table.state_of(tenant, reference)
        targets = None
        if traffic is not None:
            versions = [_require_target(state, target) for target, _ in traffic]
            if len({version.digest for version in versions}) != len(versions):
                raise InvalidRequest(
                    Reason.INVALID_PARAMETER, "traffic names one version twice; add its weights up", field="traffic"
                )
            targets = [
                TargetRecord(digest=version.digest, weight=weight)
                for version, (_, weight) in zip(versions, traffic, strict=True)
            ]
            # A stale etag is refused by the commit; loading anything for it would be for nothing.
            if warm and (not etag or etag == state.adapter.etag):
                await self._warm(state, versions)
        change = await self._commit(
            lambda: self.registry.update_adapter(
                tenant,
                reference.adapter,
                etag=etag,
                traffic=targets,
                labels=labels,
                key=key,
            )
        )
        return change.result

    async def delete_adapter(
        self, tenant: str, reference: AdapterReference, *, etag: str = "", key: IdempotencyKey | None = None
    ) -> Deletion:
        """Delete an adapter; its versions drain.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            Conflict: VERSION_CONFLICT.
        """
        check_owner(tenant, reference)
        change = await self._commit(lambda: self.registry.delete_adapter(tenant, reference.adapter, etag=etag, key=key))
        return change.result

    async def delete_version(
        self, tenant: str, reference: AdapterReference, *, key: IdempotencyKey | None = None
    ) -> Deletion:
        """Delete a version; it drains.

        Raises:
            NotFound: ADAPTER_NOT_FOUND.
            FailedPrecondition: VERSION_IN_USE.
        """
        check_owner(tenant, reference)
        change = await self._commit(lambda: self.registry.delete_version(reference, key=key))
        return change.result

    # --- uploads ---------------------------------------------------------------------------------------------------

    async def start_upload(self, tenant: str, request: UploadRequest, *, key: IdempotencyKey | None = None) -> Upload:
        """Open or resume an upload; see `UploadSessions.start`.

        Raises:
            LoramuxServerError: TENANT_QUOTA, INVALID_PARAMETER, IDEMPOTENCY_MISMATCH, STORE_UNAVAILABLE.
        """
        if key is not None:
            await asyncio.to_thread(self.registry.claim, key)
        await asyncio.to_thread(self.registry.check_room, tenant, request.adapter, None, request.labels)
        return await self._uploads.start(tenant, request)

    async def write_upload(self, tenant: str, upload_id: str, offset: int, data: bytes) -> Upload:
        """Append bytes; see `UploadSessions.write`."""
        return await self._uploads.write(tenant, upload_id, offset, data)

    async def get_upload(self, tenant: str, upload_id: str) -> Upload:
        """Read an upload; see `UploadSessions.get`."""
        return await self._uploads.get(tenant, upload_id)

    async def finish_upload(self, tenant: str, upload_id: str, *, key: IdempotencyKey | None = None) -> VersionRecord:
        """Validate a complete upload and make a version of it; see `UploadSessions.finish`."""
        if key is not None:
            replayed = await asyncio.to_thread(self.registry.recall, key, VersionRecord)
            if replayed is not None:
                return replayed

        async def commit(session: UploadSession, validated: ValidatedAdapter) -> VersionRecord:
            place = functools.partial(placement.commit_upload, self.registry, self._store, session, validated, key)
            return (await self._commit(place)).result

        return await self._uploads.finish(tenant, upload_id, commit)

    # --- internals -------------------------------------------------------------------------------------------------

    async def _preload(self, key: str) -> None:
        await self._engine.preload(key)
        self.table.note_preloaded(key)

    def _begin_unload(self, key: str) -> "asyncio.Task[None]":
        """Begin an unload, or join the one that waits for running requests: repeated calls must not pile up."""
        task = self._unloading.get(key)
        if task is None:
            task = self._unloading[key] = self._spawn(self._unload(key))
            task.add_done_callback(lambda _: self._unloading.pop(key, None))
        return task

    async def _unload(self, key: str) -> None:
        await self._engine.unload(key)
        self.table.note_unloaded(key)

    async def _warm(self, state: AdapterState, versions: Sequence[VersionRecord]) -> None:
        inside = {target.digest for target in state.adapter.traffic}
        for version in versions:
            if version.digest not in inside:
                try:
                    await self._preload(version.key)
                except Unavailable as error:
                    if error.reason is not Reason.ENGINE_UNAVAILABLE:
                        raise
                    _log.warning("traffic of %s changes without an engine to warm", version.name)
                    return

    async def _commit(self, mutate: Callable[[], Change[R]]) -> Change[R]:
        """Run a mutation and let snapshot, engine and watches follow it, also when the caller leaves meanwhile."""

        async def run() -> Change[R]:
            async with self._order:
                change = await asyncio.to_thread(mutate)
                self.table.apply(change)
                return change

        return await asyncio.shield(self._spawn(run()))

    async def _finish_drain(self, key: str) -> None:
        async with self._order:
            if key in self.table.draining:
                try:
                    await asyncio.to_thread(placement.remove_drained, self.registry, self._store, key)
                except Unavailable:
                    _log.warning("a deleted version stays in the store until the next start", exc_info=True)
                self.table.draining.discard(key)

    def _find_tensors(self, tenant: str, file: FileRecord) -> Path | None:
        digest = self.registry.find_tensors(tenant, file)
        return None if digest is None else self._store.path(tenant, digest) / file.name

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            await self._uploads.expire()

    def _spawn(self, work: Coroutine[Any, Any, R]) -> "asyncio.Task[R]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            error = task.exception()
            if error is not None and not isinstance(error, LoramuxServerError):
                _log.error("work on adapters broke", exc_info=error)


def _require_target(state: AdapterState, reference: AdapterReference) -> VersionRecord:
    if (reference.tenant, reference.adapter) != (state.adapter.tenant, state.adapter.adapter):
        raise InvalidRequest(Reason.INVALID_PARAMETER, "traffic names a version of another adapter", field="traffic")
    return ready_version(state, reference)
