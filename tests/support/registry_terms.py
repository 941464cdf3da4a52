"""Short forms of what tests of the registry say."""

from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import AdapterReference
from loramux_server.tenancy.records import AdapterRecord, TargetRecord
from loramux_server.tenancy.registry import Registry
from tests.support.lifecycle_doubles import digest_of

T = "default"


class Clock:
    """Wall-clock seconds that stand still until told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def target(content: str, weight: int = 1) -> TargetRecord:
    """A target of traffic by content."""
    return TargetRecord(digest=digest_of(content), weight=weight)


def version(content: str, adapter: str = "bot", tenant: str = T) -> AdapterReference:
    """Reference of a version by its content."""
    return AdapterReference(tenant=tenant, adapter=adapter, version=digest_of(content))


def idem(key: str = "k", payload: bytes = b"p", method: str = "UpdateAdapter", tenant: str = T) -> IdempotencyKey:
    """An idempotency key."""
    return IdempotencyKey(tenant=tenant, method=method, key=key, payload_hash=payload)


def promote(registry: Registry, content: str, **options: object) -> AdapterRecord:
    """Give all traffic of the adapter to one version."""
    return registry.update_adapter(T, "bot", traffic=[target(content)], **options).result  # type: ignore[arg-type]
