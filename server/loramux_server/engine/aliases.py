"""Alias table: which version an adapter name means now, with weighted splits that are sticky by key.

The choice is weighted rendezvous hashing over (alias, key, version): raising one version's weight only ever moves keys
towards it, and removing a version only moves its own keys.
"""

import hashlib
import math
from collections import OrderedDict

from loramux_server.engine.messages import AliasSpec

_MAX_TOMBSTONES = 65536


class AliasTable:
    """Aliases by name; a state of an older registry revision never overwrites a newer one."""

    def __init__(self) -> None:
        self._specs: dict[str, AliasSpec] = {}
        self._dropped: OrderedDict[str, int] = OrderedDict()
        self.changes = 0
        """Counts what may change the answer of `resolve`."""

    def put(self, spec: AliasSpec) -> None:
        """Set an alias unless a newer revision is known."""
        known = self._specs.get(spec.alias)
        if (known is not None and known.revision > spec.revision) or self._dropped.get(spec.alias, -1) > spec.revision:
            return
        self._dropped.pop(spec.alias, None)
        self._specs[spec.alias] = spec
        self.changes += 1

    def drop(self, alias: str, revision: int) -> None:
        """Forget an alias unless a newer revision is known."""
        known = self._specs.get(alias)
        if (known is not None and known.revision > revision) or self._dropped.get(alias, -1) > revision:
            return
        self._specs.pop(alias, None)
        self.changes += 1
        self._dropped[alias] = revision
        self._dropped.move_to_end(alias)
        if len(self._dropped) > _MAX_TOMBSTONES:
            self._dropped.popitem(last=False)

    def resolve(self, alias: str, *, split_key: str, seed: int) -> tuple[str, int] | None:
        """The version a request gets, with the revision of the state that decided; None = nothing serves.

        Args:
            alias: Adapter name.
            split_key: Requests of one key stay on one version; empty = drawn from `seed`.
            seed: The request's seed.
        """
        spec = self._specs.get(alias)
        if spec is None or not spec.targets:
            return None
        if len(spec.targets) == 1:
            return spec.targets[0][0], spec.revision
        key = b"k" + split_key.encode() if split_key else b"s%d" % seed
        best = max(spec.targets, key=lambda target: (_score(alias, key, target[0], target[1]), target[0]))
        return best[0], spec.revision


def _score(alias: str, key: bytes, version: str, weight: float) -> float:
    hasher = hashlib.blake2b(digest_size=8, person=b"loramux.split")
    for field in (alias.encode(), key, version.encode()):
        hasher.update(len(field).to_bytes(8, "big"))
        hasher.update(field)
    uniform = (int.from_bytes(hasher.digest(), "big") + 1) / (2**64 + 1)
    return weight / -math.log(uniform)
