"""What mutations of the registry are bounded by and what they answer."""

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from loramux_server.tenancy.records import AdapterState, VersionRecord

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryLimits:
    """Bounds a tenant.

    Attributes:
        adapters: Most adapters.
        versions: Most versions of one adapter that are not deleted.
        deleted_versions: Deleted versions of one adapter that are remembered; older ones are forgotten.
    """

    adapters: int = 1000
    versions: int = 1000
    deleted_versions: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Change(Generic[R]):
    """Outcome of a mutation.

    Attributes:
        result: Answer of the mutation, for a replay the first one.
        tenant: Owner of the adapter that changed.
        adapter: Its {a}.
        state: Its state now; None = it does not exist.
        revision: Registry revision now.
        replayed: Nothing was done: the idempotency key was known.
    """

    result: R
    tenant: str
    adapter: str
    state: AdapterState | None
    revision: int
    replayed: bool = False


class Deletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of a deletion: the revision that did it and, for one version, its record."""

    revision: int
    versions: tuple[VersionRecord, ...] = ()
