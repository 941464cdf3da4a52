"""The book of one adapter version: who refers to it and where its weights are."""

import dataclasses
import enum

from loramux_server.engine.messages import VersionSpec


class Residency(enum.Enum):
    """Whether a version is in the slab; `STORE` may have its rows in host memory, which comes and goes by itself."""

    STORE = "store"
    LOADING = "loading"
    GPU = "gpu"


class Room(enum.Enum):
    """Answer to `AdapterResidency.want`."""

    READY = "ready"
    LOADING = "loading"
    NONE = "none"


@dataclasses.dataclass(slots=True, kw_only=True)
class Version:
    """One adapter version.

    Attributes:
        spec: As the front end gave it.
        units: Rank units it needs; 0 = not known yet.
        state: Where its weights are.
        slot: Slab slot unless in the store.
        first_unit: First rank unit unless in the store.
        references: Requests bound to it.
        uses: Requests that run with it.
        last_used: Larger = more recent.
        fresh: Loaded, and no request has had its turn since.
        dropped: Takes no new requests.
        unloads: Operations that wait for it to leave.
        preloads: Operations that wait for it to come, each with its time limit.
        told: The `VersionState.residency` that was told last.
    """

    spec: VersionSpec
    units: int = 0
    state: Residency = Residency.STORE
    slot: int = -1
    first_unit: int = -1
    references: int = 0
    uses: int = 0
    last_used: int = 0
    fresh: bool = False
    dropped: bool = False
    unloads: list[str] = dataclasses.field(default_factory=list)
    preloads: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    told: str = "store"
