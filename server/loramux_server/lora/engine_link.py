"""What the life of adapters asks of the engine, and what it knows of residency there."""

from dataclasses import dataclass
from typing import Protocol

from loramux_server.engine.messages import AliasSpec, VersionSpec
from loramux_server.tenancy.tenants import Tenant


class EngineLink(Protocol):
    """The engine's adapter table.

    The four table commands are queued at once and in order, and do nothing without an engine; the two operations wait
    for the engine's answer.
    """

    def put_version(self, spec: VersionSpec) -> None:
        """Make a version known."""
        ...

    def drop_version(self, version: str) -> None:
        """Forget a version; `VersionState(dropped=True)` follows when nothing uses it."""
        ...

    def put_alias(self, spec: AliasSpec) -> None:
        """Set where an alias points."""
        ...

    def drop_alias(self, alias: str, revision: int) -> None:
        """Forget an alias."""
        ...

    async def preload(self, version: str) -> None:
        """Make a version resident.

        Raises:
            LoramuxServerError: ENGINE_UNAVAILABLE, or why it does not fit.
        """
        ...

    async def unload(self, version: str) -> None:
        """Give a version's residency up, once nothing uses it.

        Raises:
            LoramuxServerError: ENGINE_UNAVAILABLE.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedAdapter:
    """What a request runs on, as far as it is known on arrival. Both None: the base model.

    Attributes:
        tenant: The acted-for tenant.
        alias: Full name of the adapter, for `Add.alias`: the engine binds a version at admission.
        version: Key of a version, for `Add.version`: bound already.
        digest: Digest of `version`.
        revision: Registry revision that was looked at.
    """

    tenant: Tenant
    alias: str | None = None
    version: str | None = None
    digest: str | None = None
    revision: int = 0

    @property
    def salt(self) -> bytes:
        """Part of the root key of the tenant's cached KV."""
        return self.tenant.salt

    @property
    def weight(self) -> float:
        """The tenant's fair share."""
        return self.tenant.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Where a version is on this replica.

    Attributes:
        key: The engine's key of the version.
        level: `gpu`, `host` or `store`.
        references: Requests that hold it.
        last_used: Unix seconds at which a request was last seen to hold it; None = never.
    """

    key: str
    level: str = "store"
    references: int = 0
    last_used: float | None = None
