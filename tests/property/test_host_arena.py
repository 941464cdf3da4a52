"""Random leases, reservations and removals against a model: bytes of leased rows never change under their holder."""

import hypothesis.strategies as st
import torch
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loramux_server.engine.host_arena import HostArena, Lease
from loramux_server.model.adapter_rows import RowsLayout
from tests.support.adapters import tiny_base

CAPACITY = 40_000
LAYOUTS = [RowsLayout(tiny_base(), dtype=torch.float32, rows=rows, groups=["o"]) for rows in (1, 5, 12, 30)]
KEYS = st.sampled_from("abcdefgh")


class Arena(RuleBasedStateMachine):
    """`_at` is what the arena must hold under a key if it still holds anything there."""

    open = Bundle("open")
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self._arena = HostArena(CAPACITY, device=torch.device("cpu"))
        self._value = 0
        self._at: dict[str, int] = {}
        self._leases: list[tuple[Lease, int]] = []

    @rule(target=open, key=KEYS, layout=st.sampled_from(LAYOUTS), spare=st.sets(KEYS), keep=st.booleans())
    def reserve(
        self, key: str, layout: RowsLayout, spare: set[str], keep: bool
    ) -> tuple[str, Lease, RowsLayout] | None:
        before = {name for name in "abcdefgh" if name in self._arena}
        lease = self._arena.reserve(key, layout.nbytes, spare=spare, keep_spared=keep)
        after = {name for name in "abcdefgh" if name in self._arena}
        if lease is None:
            assert after == before, "rows left in vain"
            return None
        if keep:
            assert before & spare <= after, "a spared key left"
        self._value = self._value % 250 + 1
        lease.memory.fill_(self._value)
        self._leases.append((lease, self._value))
        return key, lease, layout

    @rule(target=held, room=consumes(open))
    def publish(self, room: tuple[str, Lease, RowsLayout] | None) -> Lease | None:
        if room is None:
            return None
        key, lease, layout = room
        lease.fill(layout)
        lease.publish()
        self._at[key] = self._value_of(lease)
        return lease

    @rule(room=consumes(open))
    def give_up(self, room: tuple[str, Lease, RowsLayout] | None) -> None:
        if room is not None:
            self._end(room[1])

    @rule(target=held, key=KEYS)
    def lease(self, key: str) -> Lease | None:
        found = self._arena.lease(key)
        if found is not None:
            self._leases.append((found, self._at[key]))
        return found

    @rule(target=held, lease=held)
    def share(self, lease: Lease | None) -> Lease | None:
        if lease is None or all(lease is not other for other, _ in self._leases):
            return None
        share = lease.share()
        self._leases.append((share, self._value_of(lease)))
        return share

    @rule(lease=held)
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            self._end(lease)

    @rule(key=KEYS)
    def remove(self, key: str) -> None:
        self._arena.remove(key)
        assert key not in self._arena

    def _value_of(self, lease: Lease) -> int:
        return next(value for other, value in self._leases if other is lease)

    def _end(self, lease: Lease) -> None:
        lease.release()
        self._leases = [entry for entry in self._leases if entry[0] is not lease]

    @invariant()
    def leased_bytes_stay(self) -> None:
        for lease, value in self._leases:
            assert bool((lease.memory == value).all()), "leased memory was overwritten"

    @invariant()
    def it_is_whole(self) -> None:
        self._arena.check_integrity()
        assert self._arena.used <= CAPACITY
        if not self._leases:
            for lease in filter(None, map(self._arena.lease, "abcdefgh")):
                lease.release()


TestArena = Arena.TestCase
