"""Tables of the registry. The tenant is the first part of every key; a schema change raises `SCHEMA_VERSION`."""

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

SCHEMA_VERSION = 1

metadata = MetaData()

state = Table(
    "state",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("schema_version", Integer, nullable=False),
    Column("revision", Integer, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("weight", Float, nullable=False),
    Column("default_adapter", String(63)),
    Column("allow_base", Boolean, nullable=False),
    Column("salt", LargeBinary, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("adapter", String(63), primary_key=True),
    Column("traffic", LargeBinary, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("labels", LargeBinary, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("create_time", Float, nullable=False),
    Column("update_time", Float, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("adapter", String(63), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("files", LargeBinary, nullable=False),
    Column("tensors_sha256", String(64), nullable=False),
    Column("max_rank", Integer, nullable=False),
    Column("modules", LargeBinary, nullable=False),
    Column("slab_units", Integer, nullable=False),
    Column("tensor_bytes", Integer, nullable=False),
    Column("base_fingerprint", String(64), nullable=False),
    Column("base_verified", Boolean, nullable=False),
    Column("create_time", Float, nullable=False),
    Column("revision", Integer, nullable=False),
    Index("versions_by_object", "tenant", "digest"),
    Index("versions_by_tensors", "tenant", "tensors_sha256"),
    Index("versions_by_revision", "tenant", "adapter", "revision"),
)

# An object on its way into the store or out of it, without a version that uses it: what a crash may leave behind.
pending_objects = Table(
    "pending_objects",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("digest", String(64), primary_key=True),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("method", String(128), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("payload_hash", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),
    Column("create_time", Float, nullable=False),
    Index("idempotency_keys_by_time", "create_time"),
)
