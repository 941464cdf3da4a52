"""Versions of adapters in the engine: loaded, reported, dropped."""

import pytest

from loramux_server.engine.engine import STATS_INTERVAL
from loramux_server.engine.messages import (
    Abort,
    DropAlias,
    DropVersion,
    Preload,
    PutVersion,
    Stats,
    Unload,
    VersionSpec,
)
from loramux_server.errors import FailedPrecondition, Reason
from tests.support.engine_driver import Driver, finish, make_driver, reason


class TestVersions:
    def test_drop_refuses_new_requests_and_lets_running_ones_finish(self) -> None:
        driver = make_driver()
        driver.put("v")
        driver.alias("a", ("v", 1.0))
        running = driver.add("running", [1], version="v", max_tokens=6)
        queued = driver.add("queued", [1], version="v", max_tokens=2)
        driver.step(3)
        driver.engine.handle([DropVersion(version="v")])
        late, aliased = driver.add("late", [1], version="v"), driver.add("aliased", [1], alias="a")
        driver.step()
        assert reason(late) == reason(aliased) == "ADAPTER_NOT_FOUND"
        assert not any(state.dropped for state in driver.states)
        finish(driver)
        assert reason(running) is None and reason(queued) is None
        final = driver.states[-1]
        assert (final.version, final.dropped, final.references) == ("v", True, 0)
        assert driver.runner.slab.resident == {}

    def test_a_version_dropped_while_it_loads_is_forgotten_when_the_load_ends(self) -> None:
        driver = make_driver(delay=3)
        driver.put("v")
        driver.engine.handle([Preload(operation_id="p", version="v")])
        driver.step()
        driver.engine.handle([DropVersion(version="v")])
        driver.step()
        assert driver.completed["p"].error is not None
        driver.run()
        assert driver.states[-1].dropped and driver.runner.slab.resident == {}

    def test_an_alias_dropped_under_a_queued_request_fails_it(self) -> None:
        driver = make_driver(max_running=1)
        driver.put("v")
        driver.alias("a", ("v", 1.0))
        driver.add("running", [1], max_tokens=5)
        queued = driver.add("queued", [1], alias="a")
        driver.step()
        driver.engine.handle([DropAlias(alias="a", revision=2)])
        finish(driver)
        assert reason(queued) == "ADAPTER_NOT_FOUND"

    def test_preload_and_unload(self) -> None:
        driver = make_driver(delay=2)
        driver.put("v")
        driver.engine.handle([Preload(operation_id="p", version="v"), Preload(operation_id="x", version="none")])
        driver.run()
        assert driver.completed["p"].error is None and driver.runner.slab.resident == {0: "/v"}
        assert driver.completed["x"].error is not None
        request = driver.add("r", [1], version="v")
        driver.run()
        assert request.started is not None and request.started.load_time == 0.0
        driver.engine.handle([Unload(operation_id="u", version="v"), Unload(operation_id="y", version="none")])
        finish(driver)
        assert driver.completed["u"].error is None and driver.runner.slab.resident == {}
        assert driver.completed["y"].error is not None

    def test_a_preload_without_room_gives_up_after_a_while(self) -> None:
        driver = make_driver(rank_units=1)
        driver.put("v", "w")
        driver.add("r", [1], version="v", max_tokens=60)
        driver.step(2)
        driver.engine.handle([Preload(operation_id="p", version="w")])
        driver.step()
        assert "p" not in driver.completed
        driver.clock.now += 10.0
        driver.step()
        error = driver.completed["p"].error
        assert error is not None and error.reason == "ADAPTER_SLOTS_EXHAUSTED"
        finish(driver)

    def test_a_failing_preload_says_why(self) -> None:
        driver = make_driver()
        driver.put("v", "w")
        driver.runner.slab.failing["/v"] = OSError("gone")
        driver.runner.slab.unreadable["/w"] = FailedPrecondition(Reason.ADAPTER_INCOMPATIBLE, "rank 128")
        driver.engine.handle([Preload(operation_id="p", version="v"), Preload(operation_id="q", version="w")])
        driver.run()
        errors = [driver.completed[operation_id].error for operation_id in ("p", "q")]
        assert [error.reason for error in errors if error] == ["STORE_UNAVAILABLE", "ADAPTER_INCOMPATIBLE"]
        refused = driver.add("r", [1], version="w")
        finish(driver)
        assert reason(refused) == "ADAPTER_INCOMPATIBLE"

    def test_a_new_path_is_taken_while_the_version_is_not_resident(self) -> None:
        driver = make_driver()
        driver.put("v")
        driver.engine.handle([PutVersion(spec=VersionSpec(version="v", digest="digest-v", path="/moved"))])
        driver.add("r", [1], version="v")
        driver.run()
        assert driver.runner.slab.started == ["/moved"]


class TestResidencyReports:
    def told(self, driver: Driver) -> list[tuple[str, int]]:
        return [(state.residency, state.references) for state in driver.states]

    def test_references_are_told_while_requests_run_and_when_they_end(self) -> None:
        driver = make_driver()
        driver.put("v")
        for index in range(4):
            driver.add(f"r{index}", [1, 2], max_tokens=30, version="v")
        driver.step(3)
        assert self.told(driver)[0] == ("store", 1)
        driver.clock.now += STATS_INTERVAL
        driver.step()
        assert self.told(driver)[-1] == ("gpu", 4)
        count = len(driver.states)
        driver.clock.now += STATS_INTERVAL
        driver.step()
        assert len(driver.states) == count, "what did not change is told once"
        finish(driver)
        assert self.told(driver)[-1] == ("gpu", 0)

    def test_a_request_that_never_ran_leaves_no_reference(self) -> None:
        driver = make_driver()
        driver.put("v")
        driver.add("r", [1], version="v")
        driver.engine.handle([Abort(request_id="r")])
        finish(driver)
        assert self.told(driver) == [("store", 1), ("store", 0)]

    def test_reports_are_bounded_however_many_requests_come(self) -> None:
        driver = make_driver()
        driver.put("v")
        driver.add("company", [1], max_tokens=200)
        driver.add("first", [1], max_tokens=1, version="v")
        driver.step(4)
        driver.clock.now += STATS_INTERVAL
        driver.step()
        count = len(driver.states)
        for index in range(30):
            driver.add(f"r{index}", [1], max_tokens=1, version="v")
            driver.step(2)
        assert self.told(driver)[count:] == [("gpu", 1)]
        driver.clock.now += STATS_INTERVAL
        driver.step()
        assert self.told(driver)[count + 1 :] == [("gpu", 0)]

    @pytest.mark.parametrize("prompt", [[1, 2], []])
    def test_a_request_of_one_step_or_none_is_in_the_last_stats(self, prompt: list[int]) -> None:
        driver = make_driver()
        for index in range(3):
            driver.add(f"r{index}", prompt, max_tokens=1)
            driver.run()
        last = [event for event in driver.events if isinstance(event, Stats)][-1]
        assert last == driver.engine.stats() and last.requests_finished + last.requests_failed == 3


class TestReading:
    def test_a_version_that_takes_long_to_read_holds_up_nobody(self) -> None:
        driver = make_driver(reading=10**6)
        driver.put("slow")
        waiting = driver.add("waiting", [1], version="slow")
        running = driver.add("running", [1, 2, 3], max_tokens=20)
        driver.step(30)
        assert running.done is not None and running.done.status == "finished"
        assert waiting.started is None and driver.engine.stalled
        driver.runner.slab.reading = 0
        driver.clock.now += 2.0
        finish(driver)
        assert waiting.started is not None and waiting.started.load_time == 2.0

    def test_a_version_that_cannot_be_read_fails_its_requests_only(self) -> None:
        driver = make_driver(reading=3)
        driver.put("bad", "good")
        driver.runner.slab.unreadable["/bad"] = FailedPrecondition(Reason.ADAPTER_INCOMPATIBLE, "rank 99")
        bad = [driver.add(f"bad{index}", [1], version="bad") for index in range(2)]
        good = driver.add("good", [1], version="good")
        driver.run()
        assert [reason(request) for request in bad] == ["ADAPTER_INCOMPATIBLE"] * 2
        assert good.done is not None and good.done.status == "finished"
        driver.assert_at_rest()


class TestPrefetch:
    """What is queued moves towards the device before its turn."""

    def test_a_queued_request_hints_its_version(self) -> None:
        driver = make_driver(rank_units=1, max_slots=1, host_size=1)
        driver.put("v", "w", "x")
        driver.alias("a", ("x", 1.0))
        driver.add("r", [1], version="v", max_tokens=9)
        driver.step(2)
        assert driver.runner.slab.hinted == ["/v"]
        driver.add("s", [1], version="w")
        driver.add("t", [1], alias="a")
        driver.add("base", [1])
        assert driver.runner.slab.hinted == ["/v", "/w", "/x"] and driver.runner.slab.started == ["/v"]
        driver.step()
        assert {(state.version, state.residency) for state in driver.states} >= {("w", "host"), ("x", "host")}
        finish(driver)
        assert driver.engine.stats().host_prefetches == 3

    def test_a_refused_request_hints_nothing(self) -> None:
        driver = make_driver()
        driver.put("v")
        driver.add("r", [1] * 1000, version="v")
        driver.add("s", [1], version="unknown")
        driver.add("t", [1], alias="unknown")
        driver.run()
        assert driver.runner.slab.hinted == []

    def test_a_load_that_fails_fails_its_requests_only(self) -> None:
        driver = make_driver(rank_units=1, max_slots=1, delay=2, host_size=1)
        driver.put("v", "w")
        driver.runner.slab.failing["/v"] = OSError(5, "gone")
        bad = [driver.add(f"v{index}", [index], version="v") for index in range(3)]
        driver.add("w", [1], version="w")
        driver.add("base", [1])
        driver.run()
        driver.judge()
        assert {reason(transcript) for transcript in bad} == {"STORE_UNAVAILABLE"}
        assert {name for name, t in driver.requests.items() if t.done and t.done.status == "finished"} == {"w", "base"}
        driver.assert_at_rest()


def test_the_adapters_of_the_last_step_are_counted() -> None:
    driver = make_driver()
    driver.put("v", "w")
    for index, version in enumerate(("v", "v", "w", None)):
        driver.add(f"r{index}", [index], version=version, max_tokens=6)
    driver.step(3)
    assert driver.engine.stats().distinct_adapters == 2
    finish(driver)
    driver.add("base", [1])
    finish(driver)
    assert driver.engine.stats().distinct_adapters == 0
