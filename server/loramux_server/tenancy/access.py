"""Who may call what: default-deny by full method name.

Every RPC has one entry in `POLICIES`; a method without one is refused, and a test walks the descriptors so that a new
RPC cannot be forgotten. There is no authentication yet: a server without credentials listens on loopback only and every
caller is the principal `local`, which acts for the tenant `default` in every role.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loramux_server.errors import AccessDenied, Reason
from loramux_server.tenancy.tenants import DEFAULT_TENANT

TENANT_METADATA = "x-loramux-tenant"


class Role(enum.StrEnum):
    """What a principal may do for the tenants that it acts for."""

    GENERATE = "generate"
    ADAPTER_ADMIN = "adapter-admin"
    OPERATOR = "operator"


class Policy(enum.Enum):
    """What a method asks of its caller."""

    EXEMPT = "exempt"
    """No credential: health only."""
    ANY_ROLE = "any"
    """A credential with any role."""
    GENERATE = "generate"
    ADAPTER_ADMIN = "adapter-admin"
    READ_ADAPTERS = "read-adapters"
    """GENERATE or ADAPTER_ADMIN."""


_ROLES_OF: Mapping[Policy, frozenset[Role]] = MappingProxyType(
    {
        Policy.ANY_ROLE: frozenset(Role),
        Policy.GENERATE: frozenset({Role.GENERATE, Role.OPERATOR}),
        Policy.ADAPTER_ADMIN: frozenset({Role.ADAPTER_ADMIN, Role.OPERATOR}),
        Policy.READ_ADAPTERS: frozenset(Role),
    }
)


def _service(name: str, methods: Mapping[str, Policy]) -> dict[str, Policy]:
    return {f"/{name}/{method}": policy for method, policy in methods.items()}


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        **_service(
            "loramux.v1.GenerationService",
            dict.fromkeys(("Generate", "BatchGenerate", "Tokenize", "Detokenize", "CancelGeneration"), Policy.GENERATE),
        ),
        **_service(
            "loramux.v1.AdapterService",
            {
                **dict.fromkeys(
                    (
                        "StartAdapterUpload",
                        "WriteAdapterUpload",
                        "GetAdapterUpload",
                        "FinishAdapterUpload",
                        "UpdateAdapter",
                        "DeleteAdapter",
                        "DeleteAdapterVersion",
                        "PreloadAdapter",
                        "UnloadAdapter",
                        "CreateGrant",
                        "ListGrants",
                        "DeleteGrant",
                        "GetTenantUsage",
                    ),
                    Policy.ADAPTER_ADMIN,
                ),
                **dict.fromkeys(
                    ("GetAdapter", "ListAdapters", "GetAdapterVersion", "ListAdapterVersions", "WatchAdapters"),
                    Policy.READ_ADAPTERS,
                ),
            },
        ),
        **_service("loramux.v1.ModelService", dict.fromkeys(("GetModel", "GetServerStatus"), Policy.ANY_ROLE)),
        **_service("grpc.health.v1.Health", dict.fromkeys(("Check", "List", "Watch"), Policy.EXEMPT)),
        **_service("grpc.reflection.v1alpha.ServerReflection", {"ServerReflectionInfo": Policy.ANY_ROLE}),
        **_service("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": Policy.ANY_ROLE}),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Owner of a credential.

    Attributes:
        name: For audit; no secret.
        tenants: Tenants that it may act for.
        roles: What it may do for them.
    """

    name: str
    tenants: frozenset[str]
    roles: frozenset[Role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acting:
    """A principal and the tenant that it acts for in one call."""

    tenant: str
    principal: str


LOCAL = Principal(name="local", tenants=frozenset({DEFAULT_TENANT}), roles=frozenset(Role))


class Access:
    """Decides calls of one principal.

    Args:
        principal: Everybody who reaches the listener.
    """

    def __init__(self, principal: Principal = LOCAL) -> None:
        self._principal = principal

    def authorize(self, method: str, metadata: Mapping[str, str]) -> Acting:
        """Decide one call.

        Args:
            method: Full name, `/package.Service/Method`.
            metadata: Request metadata, keys in lower case.

        Raises:
            AccessDenied: PERMISSION_DENIED: no policy, no role, or another tenant; the text does not tell whether that
                tenant exists.
        """
        principal = self._principal
        policy = POLICIES.get(method)
        if policy is None:
            raise AccessDenied(Reason.PERMISSION_DENIED, "this method may not be called")
        asked = metadata.get(TENANT_METADATA)
        if policy is Policy.EXEMPT:
            return Acting(tenant=DEFAULT_TENANT, principal=principal.name)
        if not principal.roles & _ROLES_OF[policy]:
            raise AccessDenied(
                Reason.PERMISSION_DENIED,
                f"the credential lacks a role for this method; it takes one of {sorted(_ROLES_OF[policy])}",
            )
        if asked is None:
            if len(principal.tenants) != 1:
                raise AccessDenied(
                    Reason.PERMISSION_DENIED,
                    f"the credential may act for several tenants; name one in metadata {TENANT_METADATA}",
                )
            (asked,) = principal.tenants
        if asked not in principal.tenants:
            raise AccessDenied(
                Reason.PERMISSION_DENIED,
                f"the credential may not act for the tenant in metadata {TENANT_METADATA}",
            )
        return Acting(tenant=asked, principal=principal.name)

    def is_operator(self, principal: str) -> bool:
        """Whether a principal that `authorize` returned has the operator role."""
        return principal == self._principal.name and Role.OPERATOR in self._principal.roles
