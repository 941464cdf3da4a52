"""The host arena: what is leased stays, what is used least goes first."""

import pytest
import torch

from loramux_server.engine.host_arena import HostArena, Lease, arena_bytes
from loramux_server.model.adapter_rows import RowsLayout
from tests.support.adapters import tiny_base

CPU = torch.device("cpu")
LAYOUT = RowsLayout(tiny_base(), dtype=torch.float32, rows=4, groups=["o"])
SIZE = -(-LAYOUT.nbytes // 64) * 64


def put(arena: HostArena, key: str, value: int = 0, **options: object) -> bool:
    lease = arena.reserve(key, LAYOUT.nbytes, **options)  # type: ignore[arg-type]
    if lease is None:
        return False
    lease.memory.fill_(value)
    lease.fill(LAYOUT)
    lease.publish()
    lease.release()
    arena.check_integrity()
    return True


def leased(arena: HostArena, key: str) -> Lease:
    lease = arena.lease(key)
    assert lease is not None
    return lease


def test_rows_are_found_again() -> None:
    arena = HostArena(3 * SIZE, device=CPU)
    assert put(arena, "a", 1) and put(arena, "b", 2)
    assert "a" in arena and arena.rank_rows("a") == 4 and arena.rank_rows("c") is None
    assert arena.used == 2 * SIZE and arena.nbytes == 3 * SIZE and not arena.page_locked
    lease = leased(arena, "b")
    assert lease.rows.layout is LAYOUT and bool((lease.rows.memory == 2).all())
    assert len(lease.rows.memory) == LAYOUT.nbytes
    lease.release()
    assert arena.lease("c") is None
    assert arena.take_changes() == ["a", "b"] and arena.take_changes() == []


def test_the_least_recently_used_goes_first() -> None:
    arena = HostArena(2 * SIZE, device=CPU)
    put(arena, "a")
    put(arena, "b")
    leased(arena, "a").release()
    assert put(arena, "c")
    assert "a" in arena and "b" not in arena
    assert arena.take_changes() == ["a", "b", "c"]


def test_what_is_leased_stays_and_is_counted() -> None:
    arena = HostArena(2 * SIZE, device=CPU)
    put(arena, "a", 1)
    lease = leased(arena, "a")
    assert put(arena, "b") and put(arena, "c"), "b made room for c"
    other = leased(arena, "c")
    assert not put(arena, "d")
    assert "a" in arena and "c" in arena, "nothing left in vain"
    share = lease.share()
    lease.release()
    lease.release()
    assert not put(arena, "d") and bool((share.rows.memory == 1).all())
    share.release()
    assert put(arena, "d") and "a" not in arena
    other.release()
    arena.check_integrity()


def test_what_is_forgotten_while_it_is_leased_lives_until_its_release() -> None:
    arena = HostArena(SIZE, device=CPU)
    put(arena, "a", 7)
    lease = leased(arena, "a")
    arena.remove("a")
    arena.remove("never there")
    assert "a" not in arena and arena.used == SIZE and not put(arena, "b")
    assert bool((lease.rows.memory == 7).all())
    lease.release()
    assert arena.used == 0 and put(arena, "b")


def test_room_that_is_not_published_is_given_back() -> None:
    arena = HostArena(SIZE, device=CPU)
    room = arena.reserve("a", 10)
    assert room is not None and "a" not in arena and len(room.memory) == 10
    room.release()
    assert arena.used == 0
    arena.check_integrity()


def test_publishing_again_replaces() -> None:
    arena = HostArena(2 * SIZE, device=CPU)
    put(arena, "a", 1)
    put(arena, "a", 2)
    assert arena.used == SIZE and bool((leased(arena, "a").rows.memory == 2).all())


def test_spared_keys_leave_last_or_not_at_all() -> None:
    arena = HostArena(2 * SIZE, device=CPU)
    put(arena, "a")
    put(arena, "b")
    assert put(arena, "c", spare={"a"}) and "a" in arena and "b" not in arena
    assert not put(arena, "d", spare={"a", "c"}, keep_spared=True)
    assert put(arena, "d", spare={"a", "c"}) and "a" not in arena


def test_holes_join() -> None:
    arena = HostArena(4 * SIZE, device=CPU)
    for key in "abcd":
        put(arena, key)
    pinned = leased(arena, "c")
    wide = arena.reserve("wide", 2 * SIZE)
    assert wide is not None and "a" not in arena and "b" not in arena and "d" in arena
    assert arena.reserve("wider", 3 * SIZE) is None and "d" in arena
    pinned.release()
    wide.release()
    assert arena.reserve("whole", 4 * SIZE) is not None
    arena.check_integrity()


def test_a_hole_that_is_a_little_too_small_is_none() -> None:
    arena = HostArena(3 * SIZE, device=CPU)
    for key in "abc":
        put(arena, key)
    pinned = leased(arena, "a"), leased(arena, "c")
    arena.remove("b")
    assert arena.reserve("wide", SIZE + 1) is None
    fits = arena.reserve("fits", SIZE)
    assert fits is not None
    arena.check_integrity()
    assert [lease.rows.layout for lease in pinned] == [LAYOUT, LAYOUT]


def test_rows_leave_until_the_hole_fits() -> None:
    arena = HostArena(4 * SIZE, device=CPU)
    for key in "abc":
        put(arena, key)
    arena.remove("a")
    room = arena.reserve("wide", SIZE + 64)
    assert room is not None and "b" not in arena and "c" in arena
    arena.check_integrity()


def test_only_what_is_in_the_way_leaves() -> None:
    arena = HostArena(8 * SIZE, device=CPU)
    for key in "abcdefgh":
        put(arena, key)
    for key in "acegbdfh":
        leased(arena, key).release()
    wide = arena.reserve("wide", 2 * SIZE)
    assert wide is not None and [key for key in "abcdefgh" if key in arena] == list("cdefgh")
    wide.release()
    spared = arena.reserve("wide", 3 * SIZE, spare={"c", "e"})
    assert spared is not None and [key for key in "abcdefgh" if key in arena] == list("cde")
    spared.release()
    assert arena.reserve("wide", 7 * SIZE) is not None and "d" not in arena and "e" not in arena
    arena.check_integrity()


def test_an_arena_of_nothing_keeps_nothing() -> None:
    arena = HostArena(0, device=CPU)
    assert arena.reserve("a", 1) is None and arena.used == 0
    arena.close()


def test_memory_of_its_own_is_no_arenas() -> None:
    lease = Lease(torch.zeros(LAYOUT.nbytes, dtype=torch.uint8))
    lease.fill(LAYOUT)
    lease.publish()
    share = lease.share()
    lease.release()
    assert share.rows.layout is LAYOUT


def test_the_size_is_bounded_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert arena_bytes(None, cuda=True) == 1 << 30 and arena_bytes(None, cuda=False) == 256 << 20
    assert arena_bytes(3 << 30, cuda=True) == 2 << 30 and arena_bytes(0, cuda=True) == 0
    assert arena_bytes(5, cuda=False) == 5
