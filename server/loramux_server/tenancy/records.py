"""What the registry holds, as immutable records. Times are Unix seconds, sizes bytes, digests sha256 hex."""

import enum
import hashlib

import msgspec

from loramux_server.tenancy import names


class VersionState(enum.StrEnum):
    """Life of a version. FAILED uploads never become a record."""

    READY = "READY"
    DRAINING = "DRAINING"
    DELETED = "DELETED"


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a version."""

    name: str
    size: int
    sha256: str


class TargetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A share of an adapter's traffic: `weight` of the sum of weights goes to the version of `digest`."""

    digest: str
    weight: int


class VersionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable adapter version.

    Attributes:
        tenant: Owner.
        adapter: Adapter it belongs to.
        digest: 64 hexadecimal digits.
        state: Where it is in its life.
        files: Sorted by name.
        max_rank: Largest rank of any module.
        modules: Linear modules it changes, sorted.
        slab_units: Units of 16 rank rows that it takes in the device slab.
        tensor_bytes: Bytes of its tensors.
        base_fingerprint: Base it was trained on; "" when it came without a manifest.
        base_verified: Whether that was checked against the served base.
        create_time: Unix seconds.
        revision: Registry revision that created it; orders versions of one adapter.
    """

    tenant: str
    adapter: str
    digest: str
    state: VersionState
    files: tuple[FileRecord, ...]
    max_rank: int
    modules: tuple[str, ...]
    slab_units: int
    tensor_bytes: int
    base_fingerprint: str
    base_verified: bool
    create_time: float
    revision: int

    @property
    def name(self) -> str:
        """Full name as the API shows it."""
        return names.version_name(self.tenant, self.adapter, self.digest)

    @property
    def key(self) -> str:
        """The engine's key."""
        return names.version_key(self.tenant, self.adapter, self.digest)


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A named adapter: an alias over immutable versions.

    Attributes:
        tenant: Owner.
        adapter: {a} of its name.
        traffic: Where requests without a version go; empty = nothing serves.
        previous: Digest that served before the serving version last changed; "" = none.
        labels: The owner's.
        revision: Registry revision of the last change.
        create_time: Unix seconds.
        update_time: Unix seconds.
    """

    tenant: str
    adapter: str
    traffic: tuple[TargetRecord, ...]
    previous: str
    labels: dict[str, str]
    revision: int
    create_time: float
    update_time: float

    @property
    def name(self) -> str:
        """Full name."""
        return names.adapter_name(self.tenant, self.adapter)

    @property
    def serving(self) -> str:
        """Digest with the largest weight, the first of equals; "" = nothing serves."""
        return serving(self.traffic)

    @property
    def etag(self) -> str:
        """Changes with every change; opaque, so that nobody computes the next one."""
        return hashlib.sha256(f"{self.name}\0{self.revision}".encode()).hexdigest()[:16]


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter and its versions that are not DELETED, newest first."""

    adapter: AdapterRecord
    versions: tuple[VersionRecord, ...]


class NewVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A validated version that is about to be committed; fields as in `VersionRecord`."""

    tenant: str
    adapter: str
    digest: str
    files: tuple[FileRecord, ...]
    max_rank: int
    modules: tuple[str, ...]
    slab_units: int
    tensor_bytes: int
    base_fingerprint: str
    base_verified: bool


def serving(traffic: tuple[TargetRecord, ...]) -> str:
    """Digest with the largest weight, the first of equals; "" without any."""
    if not traffic:
        return ""
    return max(traffic, key=lambda target: target.weight).digest
