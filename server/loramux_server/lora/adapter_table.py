"""The adapter table of this replica: what requests are resolved from, in memory, and what the engine is told.

It follows the registry change by change (`apply`), in order of revision, and pushes the difference to the engine at
once. It also knows where versions are resident and which of them drain. Used on the event loop only; only `reaches`
waits.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loramux_server.engine.messages import AliasSpec, Command, PutAlias, PutVersion, VersionSpec
from loramux_server.engine.messages import VersionState as VersionStateEvent
from loramux_server.errors import AccessDenied, InvalidRequest, NotFound, Reason
from loramux_server.lora.engine_link import EngineLink, Residency, ResolvedAdapter
from loramux_server.tenancy.changes import Change
from loramux_server.tenancy.names import (
    AdapterReference,
    adapter_name,
    adapter_not_found,
    parse_reference,
    split_version_key,
)
from loramux_server.tenancy.reader import Snapshot
from loramux_server.tenancy.records import AdapterRecord, AdapterState, VersionRecord, VersionState
from loramux_server.tenancy.rows import ambiguous
from loramux_server.tenancy.tenants import Tenant


class AdapterTable:
    """See the module.

    Args:
        engine: Told of every difference.
        path_of: Directory of an object, by tenant and digest.
        publish: Told (tenant, {a}, revision) of every change.
        clock: Unix seconds.
    """

    def __init__(
        self,
        engine: EngineLink,
        path_of: Callable[[str, str], Path],
        publish: Callable[[str, str, int], None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._engine = engine
        self._path_of = path_of
        self._publish = publish
        self._tenants: Mapping[str, Tenant] = {}
        self._residency: dict[str, Residency] = {}
        self._moved = asyncio.Event()
        self.revision = 0
        self.adapters: dict[tuple[str, str], AdapterState] = {}
        self.draining: set[str] = set()

    def load(self, snapshot: Snapshot) -> None:
        """Begin with what the registry holds; tells the engine nothing, see `commands`."""
        self.revision = snapshot.revision
        self.adapters = dict(snapshot.adapters)
        self._tenants = snapshot.tenants

    async def reaches(self, revision: int, seconds: float) -> bool:
        """Wait at most so long until this table shows a revision; returns whether it does."""
        try:
            async with asyncio.timeout(seconds):
                while self.revision < revision:
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True

    def tenant(self, name: str) -> Tenant:
        """Return a tenant.

        Raises:
            AccessDenied: PERMISSION_DENIED, it is unknown.
        """
        try:
            return self._tenants[name]
        except KeyError:
            raise AccessDenied(Reason.PERMISSION_DENIED, "the credential may not act for the named tenant") from None

    def resolve(self, tenant: str, adapter: str | None, *, field: str = "adapter") -> ResolvedAdapter:
        """Find what a request runs on.

        Args:
            tenant: The acted-for tenant.
            adapter: The request's field; None = absent.
            field: Name of the request's field, for errors.

        Raises:
            NotFound: ADAPTER_NOT_FOUND: unknown, foreign, deleted, or nothing of it serves.
            InvalidRequest: The text is empty or no name, 16 digits are ambiguous, or there is no default to use.
        """
        owner = self.tenant(tenant)
        if adapter is None:
            if owner.default_adapter is None:
                if not owner.allow_base:
                    raise InvalidRequest(
                        Reason.INVALID_PARAMETER,
                        f"{field} is absent, and this tenant has no default adapter and may not use the base model; "
                        "name an adapter",
                        field=field,
                    )
                return ResolvedAdapter(tenant=owner, revision=self.revision)
            reference = AdapterReference(tenant=tenant, adapter=owner.default_adapter)
        else:
            reference = parse_reference(adapter, tenant, field)
        state = self.state_of(tenant, reference)
        if reference.version is None:
            if not state.adapter.traffic:
                raise NotFound(
                    Reason.ADAPTER_NOT_FOUND,
                    f"adapter {reference.adapter!r} has no version in its traffic; put one there by UpdateAdapter, or "
                    "name a version",
                    field=field,
                    metadata={"adapter": reference.adapter},
                )
            return ResolvedAdapter(tenant=owner, alias=state.adapter.name, revision=self.revision)
        version = ready_version(state, reference)
        return ResolvedAdapter(tenant=owner, version=version.key, digest=version.digest, revision=self.revision)

    def state_of(self, tenant: str, reference: AdapterReference) -> AdapterState:
        """Find an adapter of the acted-for tenant.

        Raises:
            NotFound: ADAPTER_NOT_FOUND: unknown or another tenant's, in the same words.
        """
        check_owner(tenant, reference)
        state = self.adapters.get((reference.tenant, reference.adapter))
        if state is None:
            raise adapter_not_found(reference)
        return state

    # --- the engine ------------------------------------------------------------------------------------------------

    def apply(self, change: Change[Any]) -> None:
        """Follow a change of the registry: this table, then the engine, then the watches."""
        where = (change.tenant, change.adapter)
        old, new = self.adapters.get(where), change.state
        if new is None:
            self.adapters.pop(where, None)
        else:
            self.adapters[where] = new
        self.revision = max(self.revision, change.revision)
        self._moved.set()
        self._moved = asyncio.Event()
        before, after = _ready(old), _ready(new)
        for key in after.keys() - before.keys():
            self.draining.discard(key)
            self._engine.put_version(self._version_spec(after[key]))
        if new is None:
            self._engine.drop_alias(adapter_name(*where), change.revision)
        elif old is None or old.adapter.traffic != new.adapter.traffic:
            self._engine.put_alias(_alias_spec(new.adapter))
        for key in before.keys() - after.keys():
            self.draining.add(key)
            self._engine.drop_version(key)
        if old != new:
            self._publish(*where, change.revision)

    def commands(self) -> list[Command]:
        """Commands that bring a fresh engine process to the registry's state: versions, then aliases by revision."""
        states = sorted(self.adapters.values(), key=lambda state: state.adapter.revision)
        versions: list[Command] = [
            PutVersion(spec=self._version_spec(version)) for state in states for version in _ready(state).values()
        ]
        return versions + [PutAlias(spec=_alias_spec(state.adapter)) for state in states]

    def forget_residency(self) -> None:
        """Forget where versions were: their engine process ended."""
        self._residency.clear()

    def on_version_state(self, event: VersionStateEvent) -> None:
        """Take in where a version is now."""
        if event.dropped or (event.residency == "store" and not event.references):
            self._residency.pop(event.version, None)
        else:
            before = self.residency(event.version)
            used = event.references > 0 or before.references > 0
            self._residency[event.version] = Residency(
                key=event.version,
                level=event.residency,
                references=event.references,
                last_used=self._clock() if used else before.last_used,
            )
        self._publish_residency(event.version)

    def note_preloaded(self, key: str) -> None:
        """Take in that the engine answered a preload."""
        before = self.residency(key)
        if before.level != "gpu":
            self._residency[key] = dataclasses.replace(before, level="gpu")
            self._publish_residency(key)

    def note_unloaded(self, key: str) -> None:
        """Take in that the engine answered an unload; what it keeps in host memory stays known."""
        if self.residency(key).level == "gpu":
            del self._residency[key]
            self._publish_residency(key)

    def residency(self, key: str) -> Residency:
        """Where a version is on this replica."""
        return self._residency.get(key) or Residency(key=key)

    def resident(self, level: str, tenant: str | None = None) -> int:
        """Count versions at a residency level, of one tenant or of all."""
        return sum(
            1
            for item in self._residency.values()
            if item.level == level and (tenant is None or split_version_key(item.key)[0] == tenant)
        )

    def is_resident(self, key: str) -> bool:
        """Whether the engine holds a version in the slab or in host memory."""
        return key in self._residency

    def resident_versions(self, state: AdapterState) -> list[Residency]:
        """Where the versions of an adapter are, those that are only in the store left out."""
        return [self._residency[version.key] for version in state.versions if version.key in self._residency]

    def check_integrity(self) -> None:
        """Assert that traffic goes to versions that can serve and that nothing both serves and drains."""
        for state in self.adapters.values():
            assert state.adapter.revision <= self.revision, "an adapter is newer than the table"
            ready = _ready(state)
            assert not self.draining & ready.keys(), "a version that drains can serve"
            digests = {version.digest for version in ready.values()}
            assert all(target.digest in digests for target in state.adapter.traffic), "traffic to a missing version"

    def _publish_residency(self, key: str) -> None:
        tenant, adapter, _ = split_version_key(key)
        state = self.adapters.get((tenant, adapter))
        if state is not None:
            self._publish(tenant, adapter, state.adapter.revision)

    def _version_spec(self, version: VersionRecord) -> VersionSpec:
        return VersionSpec(
            version=version.key, digest=version.digest, path=str(self._path_of(version.tenant, version.digest))
        )


def check_owner(tenant: str, reference: AdapterReference) -> None:
    """Refuse another tenant's adapter before any look-up, in the words for an unknown one."""
    if reference.tenant != tenant:
        raise adapter_not_found(reference)


def ready_version(state: AdapterState, reference: AdapterReference) -> VersionRecord:
    """Find a version that can serve, by 16 or 64 digits.

    Raises:
        NotFound: ADAPTER_NOT_FOUND.
        InvalidRequest: Two versions share the 16 digits.
    """
    assert reference.version is not None, "a version is required"
    found = [version for version in _ready(state).values() if version.digest.startswith(reference.version)]
    if not found:
        raise adapter_not_found(reference)
    if len(found) > 1:
        raise ambiguous(reference)
    return found[0]


def _ready(state: AdapterState | None) -> dict[str, VersionRecord]:
    if state is None:
        return {}
    return {version.key: version for version in state.versions if version.state is VersionState.READY}


def _alias_spec(adapter: AdapterRecord) -> AliasSpec:
    return AliasSpec(
        alias=adapter.name,
        targets=[(f"{adapter.name}/versions/{target.digest}", float(target.weight)) for target in adapter.traffic],
        revision=adapter.revision,
    )
