"""Tenants: whom requests, adapters, quotas and cached KV belong to."""

import secrets
from dataclasses import dataclass, field

DEFAULT_TENANT = "default"
SALT_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant.

    Attributes:
        name: Matches `names.NAME`.
        weight: Share in the scheduler's fairness, > 0.
        default_adapter: {a} used by requests that name none; None = the base model if `allow_base`.
        allow_base: Whether requests may run on the base model alone.
        salt: 32 secret bytes made by this server; part of the root key of the tenant's cached KV, so that no tenant can
            hit or probe another's cache. Never leaves the server, never in a log (hence not in `repr`).
    """

    name: str
    weight: float = 1.0
    default_adapter: str | None = None
    allow_base: bool = True
    salt: bytes = field(repr=False)


def new_salt() -> bytes:
    """Draw the salt of a new tenant."""
    return secrets.token_bytes(SALT_BYTES)
