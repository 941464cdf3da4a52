"""Idempotency keys: a mutation that is sent again with its key gets its first answer.

The answer is written in the mutation's own transaction, unique on (tenant, method, key), and kept for 24 h. A replay
therefore succeeds also when the etag that it carries has become stale.
"""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select

from loramux_server.errors import InvalidRequest, Reason, ResourceExhausted
from loramux_server.tenancy.schema import idempotency_keys as table

KEEP_SECONDS = 24 * 3600
LONGEST_KEY = 128
MOST_KEYS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyKey:
    """The key of one call.

    Attributes:
        tenant: The acted-for tenant.
        method: Name of the RPC.
        key: The caller's, 1 to 128 bytes.
        payload_hash: sha256 of the serialized request.
    """

    tenant: str
    method: str
    key: str
    payload_hash: bytes


def check_key(key: str) -> str:
    """Check the length of a caller's key.

    Raises:
        InvalidRequest: It is empty or longer than 128 bytes.
    """
    size = len(key.encode())
    if not 1 <= size <= LONGEST_KEY:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"idempotency_key has {size} bytes; use 1 to {LONGEST_KEY}, or leave it out",
            field="idempotency_key",
        )
    return key


def recall(connection: Connection, key: IdempotencyKey, now: float) -> bytes | None:
    """Return the stored answer of a key, or None if it is new or older than 24 h.

    Raises:
        InvalidRequest: IDEMPOTENCY_MISMATCH, the key was used with another payload.
    """
    row = connection.execute(
        select(table.c.payload_hash, table.c.response).where(_is(key), table.c.create_time > now - KEEP_SECONDS)
    ).one_or_none()
    if row is None:
        return None
    if row.payload_hash != key.payload_hash:
        raise InvalidRequest(
            Reason.IDEMPOTENCY_MISMATCH,
            f"idempotency_key was used for another {key.method} within 24 h; use a new key for a new request",
            field="idempotency_key",
        )
    return bytes(row.response)


def remember(connection: Connection, key: IdempotencyKey, response: bytes, now: float) -> None:
    """Store the answer of a key, and forget the keys that are older than 24 h.

    Raises:
        ResourceExhausted: TENANT_QUOTA, the tenant has 100,000 keys of the last 24 h.
    """
    connection.execute(delete(table).where(table.c.create_time <= now - KEEP_SECONDS))
    connection.execute(delete(table).where(_is(key)))
    held = connection.execute(select(func.count()).where(table.c.tenant == key.tenant)).scalar_one()
    if held >= MOST_KEYS:
        raise ResourceExhausted(
            Reason.TENANT_QUOTA,
            f"the tenant has used {held} idempotency keys within 24 h; send fewer changes",
            retry_after=60.0,
        )
    connection.execute(
        insert(table).values(
            tenant=key.tenant,
            method=key.method,
            key=key.key,
            payload_hash=key.payload_hash,
            response=response,
            create_time=now,
        )
    )


def _is(key: IdempotencyKey) -> ColumnElement[bool]:
    return and_(table.c.tenant == key.tenant, table.c.method == key.method, table.c.key == key.key)
