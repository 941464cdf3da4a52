from loramux_server.engine.slab_layout import Tenure, Window, find_window, find_window_to_drain


def tenure(version: str, first: int, units: int, *, busy: int = 0, last_used: int = 0) -> Tenure:
    return Tenure(version=version, first_unit=first, units=units, busy=busy, last_used=last_used)


def test_free_space_comes_before_eviction() -> None:
    tenures = [tenure("a", 0, 2), tenure("b", 4, 2)]
    assert find_window(tenures, 2, 8) == Window(first_unit=2, leaving=())
    assert find_window(tenures, 3, 6) == Window(first_unit=0, leaving=("a",))


def test_the_least_recently_used_neighbourhood_leaves() -> None:
    tenures = [tenure("old", 0, 2, last_used=1), tenure("new", 2, 2, last_used=9), tenure("mid", 4, 2, last_used=5)]
    assert find_window(tenures, 2, 6) == Window(first_unit=0, leaving=("old",))
    assert find_window(tenures, 4, 6) == Window(first_unit=0, leaving=("old", "new"))


def test_what_is_in_use_stays() -> None:
    tenures = [tenure("a", 0, 2, busy=1), tenure("b", 2, 2, last_used=9)]
    assert find_window(tenures, 2, 4) == Window(first_unit=2, leaving=("b",))
    assert find_window(tenures, 3, 4) is None
    assert find_window(tenures, 5, 4) is None


def test_the_window_to_drain_has_the_least_work_in_it() -> None:
    tenures = [tenure("a", 0, 2, busy=5), tenure("b", 2, 2, busy=1), tenure("c", 4, 2, busy=2)]
    assert find_window_to_drain(tenures, 2, 6) == Window(first_unit=2, leaving=("b",))
    assert find_window_to_drain(tenures, 4, 6) == Window(first_unit=2, leaving=("b", "c"))
    assert find_window_to_drain(tenures, 7, 6) is None
