import pytest

from loramux_server.engine.pages import PagePool


def test_hands_out_every_page_but_the_trash_page() -> None:
    pool = PagePool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.available, pool.used) == (0, 4)
    with pytest.raises(AssertionError, match="0 available"):
        pool.allocate(1)


def test_a_shared_page_is_free_when_the_last_reference_goes() -> None:
    pool = PagePool(3)
    [page] = pool.allocate(1)
    pool.retain(page)
    pool.release([page])
    assert pool.available == 1
    pool.release([page])
    assert pool.available == 2
    with pytest.raises(AssertionError, match="more often than taken"):
        pool.release([page])
    with pytest.raises(AssertionError, match="is free"):
        pool.retain(page)
    pool.check_integrity()


def test_idle_cached_pages_are_evicted_least_recently_used_first() -> None:
    pool = PagePool(4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    pages = pool.allocate(3)
    for page in pages:
        pool.cache(page)
    pool.release(reversed(pages))
    assert (pool.idle, pool.used, pool.available) == (3, 0, 3)
    pool.retain(pages[2])
    pool.release([pages[2]])
    pool.allocate(2)
    assert evicted == [pages[1], pages[0]]
    pool.check_integrity()


def test_uncached_idle_page_is_free_and_reported() -> None:
    pool = PagePool(3, track_freed=True)
    [page] = pool.allocate(1)
    pool.cache(page)
    pool.release([page])
    assert pool.take_freed() == []
    pool.uncache(page)
    assert pool.take_freed() == [page] and pool.take_freed() == []
    assert pool.idle == 0
    pool.check_integrity()


def test_integrity_check_finds_a_page_in_two_states() -> None:
    pool = PagePool(3)
    [page] = pool.allocate(1)
    pool._free.append(page)
    with pytest.raises(AssertionError, match="2 states"):
        pool.check_integrity()


def test_refuses_a_pool_without_usable_pages() -> None:
    with pytest.raises(ValueError, match="num_pages"):
        PagePool(1)
