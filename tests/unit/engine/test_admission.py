"""Adapters compete for the slab: who is skipped, who waits, and that nobody waits for ever."""

import pytest

from loramux_server.engine.adapter_version import Room
from loramux_server.engine.admission import MAX_PASSED_OVER
from loramux_server.engine.messages import Unload
from loramux_server.engine.residency import AdapterResidency
from tests.support.engine_driver import Driver, make_driver


def finish(driver: Driver) -> None:
    driver.run()
    driver.judge()
    driver.assert_at_rest()


def started_order(driver: Driver) -> list[str]:
    return [event.request_id for event in driver.events if type(event).__name__ == "Started"]


def test_a_load_holds_up_only_its_own_request() -> None:
    driver = make_driver(delay=5)
    driver.put("v")
    driver.add("cold", [1, 2], version="v", max_tokens=1)
    driver.add("base", [1, 2], max_tokens=3)
    driver.step(3)
    assert driver.requests["base"].done is not None
    assert driver.requests["cold"].started is None
    driver.clock.now += 2.0
    finish(driver)
    started = driver.requests["cold"].started
    assert started is not None and (started.load_time, started.queue_time) == (2.0, 2.0)


def test_no_room_skips_the_request_and_blocks_nobody() -> None:
    driver = make_driver(rank_units=2, units={"/big": 2})
    driver.put("v", "big")
    driver.add("first", [1], version="v", max_tokens=10)
    driver.step(2)
    driver.add("big", [1], version="big", max_tokens=1)
    driver.add("second", [1], version="v", max_tokens=1)
    driver.add("base", [1], max_tokens=1)
    driver.step()
    assert started_order(driver) == ["first", "second", "base"]
    finish(driver)


def test_a_request_passed_over_too_often_gets_its_place() -> None:
    driver = make_driver(rank_units=2, units={"/big": 2}, max_running=4)
    driver.put("v", "w", "big")
    driver.add("v0", [1], version="v", max_tokens=4)
    driver.add("w0", [1], version="w", max_tokens=4)
    driver.step(2)
    driver.add("big", [1], version="big", max_tokens=1)
    passed = 0
    for number in range(1, 60):
        driver.add(f"v{number}", [1], version="v", max_tokens=4)
        driver.add(f"w{number}", [1], version="w", max_tokens=4)
        driver.add(f"base{number}", [1], max_tokens=1)
        driver.step()
        if driver.requests["big"].started is not None:
            break
    order = started_order(driver)
    passed = sum(not name.startswith("base") for name in order[2 : order.index("big")])
    assert MAX_PASSED_OVER <= passed <= MAX_PASSED_OVER + 2
    assert any(name.startswith("base") for name in order), "requests for the base went on"
    finish(driver)


def test_an_aged_request_holds_up_only_what_stands_in_its_window() -> None:
    driver = make_driver(rank_units=4, units={"/big": 2, "/wide": 2}, max_running=8)
    driver.put("v", "wide", "big")
    driver.add("wide0", [1], version="wide", max_tokens=40)
    driver.add("wide1", [1], version="wide", max_tokens=40)
    driver.add("wide2", [1], version="wide", max_tokens=40)
    driver.add("v0", [1], version="v", max_tokens=25)
    driver.put("x")
    driver.add("x0", [1], version="x", max_tokens=25)
    driver.step(2)
    driver.add("big", [1], version="big", max_tokens=1)
    for number in range(MAX_PASSED_OVER):
        driver.add(f"v{number + 1}", [1], version="v", max_tokens=1)
        driver.step(2)
    driver.add("late-v", [1], version="v", max_tokens=1)
    driver.add("late-wide", [1], version="wide", max_tokens=1)
    finish(driver)
    order = started_order(driver)
    assert order.index("late-wide") < order.index("late-v")


def test_eviction_takes_the_least_recently_used() -> None:
    driver = make_driver(rank_units=2)
    driver.put("a", "b", "c")
    for name in ("a", "b", "a", "c"):
        driver.add(f"r{len(driver.requests)}", [1], version=name, max_tokens=1)
        driver.run()
    assert set(driver.runner.slab.resident.values()) == {"/a", "/c"}
    assert driver.engine.stats().adapter_evictions == 1
    assert driver.runner.slab.started == ["/a", "/b", "/c"]


def test_slots_are_a_limit_of_their_own() -> None:
    driver = make_driver(rank_units=8, max_slots=1)
    driver.put("a", "b")
    driver.add("r", [1], version="a", max_tokens=5)
    driver.step(2)
    driver.add("s", [1], version="b", max_tokens=1)
    driver.step(2)
    assert driver.requests["s"].started is None
    finish(driver)
    assert driver.runner.slab.resident == {0: "/b"}


def test_a_failed_load_fails_only_the_requests_of_its_version() -> None:
    driver = make_driver(delay=2)
    driver.put("bad", "good")
    driver.alias("a", ("bad", 1.0))
    driver.runner.slab.failing["/bad"] = OSError("gone")
    driver.add("pinned", [1], version="bad")
    driver.add("alias", [1], alias="a")
    driver.add("good", [1], version="good")
    finish(driver)
    reasons = {name: t.done.error.reason for name, t in driver.requests.items() if t.done and t.done.error}
    assert reasons == {"pinned": "STORE_UNAVAILABLE", "alias": "STORE_UNAVAILABLE"}
    del driver.runner.slab.failing["/bad"]
    driver.add("again", [1], alias="a")
    finish(driver)
    assert driver.requests["again"].done is not None and driver.requests["again"].done.status == "finished"


def test_an_adapter_larger_than_the_slab_is_refused() -> None:
    driver = make_driver(rank_units=2, units={"/big": 3})
    driver.put("big")
    driver.add("r", [1], version="big")
    finish(driver)
    done = driver.requests["r"].done
    assert done is not None and done.error is not None and done.error.reason == "ADAPTER_SLOTS_EXHAUSTED"


def test_a_queued_request_follows_its_alias_until_it_is_admitted() -> None:
    driver = make_driver(max_running=1)
    driver.put("v", "w")
    driver.alias("a", ("v", 1.0), revision=1)
    driver.add("running", [1], alias="a", max_tokens=4)
    driver.add("queued", [1], alias="a", max_tokens=1)
    driver.add("exact", [1], version="v", max_tokens=1)
    driver.step(3)
    driver.alias("a", ("w", 1.0), revision=2)
    finish(driver)
    bound = {name: (t.started.version, t.started.revision) for name, t in driver.requests.items() if t.started}
    assert bound == {"running": ("v", 1), "queued": ("w", 2), "exact": ("v", 0)}


def test_a_hot_swap_under_load_mixes_nothing() -> None:
    driver = make_driver(page_size=4, delay=2)
    driver.put("v1", "v2")
    driver.alias("bot", ("v1", 1.0), revision=1)
    prompt = list(range(12))
    for number in range(4):
        driver.add(f"old{number}", prompt, alias="bot", max_tokens=20, seed=number)
    driver.step(6)
    driver.alias("bot", ("v2", 1.0), revision=2)
    for number in range(4):
        driver.add(f"new{number}", prompt, alias="bot", max_tokens=20, seed=number)
        driver.step(5)
    finish(driver)
    bound = {name: t.started.version for name, t in driver.requests.items() if t.started}
    assert bound == {f"{age}{n}": v for age, v in (("old", "v1"), ("new", "v2")) for n in range(4)}
    cached = [t.started.cached_tokens for name, t in driver.requests.items() if t.started and name[:3] == "new"]
    assert cached[0] == 0 and max(cached) == 8


def test_unload_waits_for_running_requests_and_is_not_starved_by_new_ones() -> None:
    driver = make_driver()
    driver.put("v")
    driver.add("r", [1], version="v", max_tokens=5)
    driver.step(2)
    driver.engine.handle([Unload(operation_id="u", version="v")])
    driver.add("s", [1], version="v", max_tokens=1)
    driver.step()
    assert "u" not in driver.completed and driver.requests["s"].started is None
    finish(driver)
    assert driver.completed["u"].error is None
    assert driver.runner.slab.started == ["/v", "/v"]
    assert driver.requests["s"].done is not None and driver.requests["s"].done.status == "finished"


def test_a_queue_without_slab_room_is_not_tried_again_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make_driver(rank_units=1, max_running=8)
    driver.put("v", "w")
    driver.add("v0", [1], version="v", max_tokens=20)
    driver.step(2)
    waiting = [driver.add(f"w{index}", [1], version="w", max_tokens=1) for index in range(5)]
    driver.step(2)
    asked: list[str] = []
    want = AdapterResidency.want

    def counted(self: AdapterResidency, version: str, *, newcomer: bool = False) -> Room:
        asked.append(version)
        return want(self, version, newcomer=newcomer)

    monkeypatch.setattr(AdapterResidency, "want", counted)
    driver.step(5)
    assert asked == []
    driver.add("base", [1], max_tokens=2)
    driver.step()
    assert asked == ["w"] * 5, "a new arrival is a change"
    asked.clear()
    driver.step(3)
    assert asked == ["w"] * 5, "so is its admission, once"
    finish(driver)
    assert all(request.started is not None for request in waiting)
