"""Steps launched before the results of the one before them are in."""

import dataclasses

import pytest

from loramux_server.engine.faults import Faults, FaultyRunner
from loramux_server.engine.messages import Abort, Shutdown
from loramux_server.engine.plan import StepHandle, StepPlan, StepResult
from tests.support.engine_driver import Driver, make_driver
from tests.support.fake_runner import FakeRunner


class RecordingRunner(FakeRunner):
    """Notes launches and when their results are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def launch(self, plan: StepPlan) -> StepHandle:
        self.log.append(("launch", plan.step))
        handle = super().launch(plan)
        log = self.log

        class Handle:
            def result(self) -> StepResult:
                log.append(("result", plan.step))
                return handle.result()

        return Handle()


def ahead(**config: object) -> Driver:
    return make_driver(schedule_ahead=True, **config)  # type: ignore[arg-type]


def finish(driver: Driver) -> None:
    driver.run()
    driver.judge()
    driver.assert_at_rest()


def late_rows(driver: Driver) -> int:
    return sum(row.source >= 0 for plan in driver.runner.plans for row in plan.rows)


def test_the_next_step_is_launched_before_results_are_taken() -> None:
    runner = RecordingRunner()
    driver = Driver(runner=runner, schedule_ahead=True)
    driver.add("r", [1, 2, 3], max_tokens=5)
    finish(driver)
    assert runner.log == [
        ("launch", 1),
        *(entry for step in range(1, 5) for entry in (("launch", step + 1), ("result", step))),
        ("result", 5),
    ]
    assert [plan.behind for plan in runner.plans] == [0, 1, 2, 3, 4]


def test_a_synchronous_device_runs_one_step_after_the_other() -> None:
    runner = RecordingRunner()
    driver = Driver(runner=runner)
    driver.add("r", [1, 2, 3], max_tokens=3)
    finish(driver)
    assert [kind for kind, _ in runner.log] == ["launch", "result"] * 3


def test_no_row_follows_the_last_token_that_max_tokens_allows() -> None:
    driver = ahead()
    driver.add("short", [1, 2], max_tokens=2)
    driver.add("long", [3, 4], max_tokens=6)
    finish(driver)
    rows = [row for plan in driver.runner.plans for row in plan.rows]
    assert sum(row.history[:2] == [1, 2] for row in rows) == 2
    assert late_rows(driver) == 6


def test_a_row_behind_an_end_token_is_dropped() -> None:
    runner = RecordingRunner()
    driver = Driver(runner=runner, schedule_ahead=True)
    request = driver.add("r", [1, 2, 3], max_tokens=40, eos_token_ids=list(range(0, 64, 5)))
    finish(driver)
    assert request.done is not None
    given = len(request.tokens[0])
    assert given < 40
    assert late_rows(driver) == given, "one row was computed behind the end token"
    assert len(runner.log) == 2 * len(runner.plans), "a step was left on the device"
    assert request.done.computed_tokens == 3 + given - 1, "the dropped row is not charged"


def test_a_newcomer_joins_behind_a_launched_step() -> None:
    driver = ahead()
    driver.add("a", [1, 2, 3], max_tokens=8)
    driver.step(2)
    driver.add("b", [4, 5, 6], max_tokens=3)
    driver.step()
    assert [len(row.token_ids) for row in driver.runner.plans[-1].rows] == [1, 3]
    finish(driver)


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.1},
        {"bad_words": [[1], [1, 2], [1, 2, 3]]},
        {"min_tokens": 3, "eos_token_ids": [7], "logit_bias": {7: 2.0}},
    ],
)
def test_penalties_and_bans_wait_for_no_token(fields: dict[str, object]) -> None:
    driver = ahead()
    driver.add("r", [1, 2, 3], max_tokens=5, **fields)
    driver.add("other", [4, 5], max_tokens=5)
    finish(driver)
    assert late_rows(driver) == 8
    late = [row for plan in driver.runner.plans for row in plan.rows if row.source >= 0]
    assert {row.position - row.start for row in late} == {1}


def test_two_late_tokens_of_a_sequence_are_an_error() -> None:
    driver = ahead()
    driver.add("r", [1, 2, 3], max_tokens=9)
    driver.step(2)
    flight = driver.engine._flight
    assert flight is not None
    (row,) = flight.plan.rows
    two_on = dataclasses.replace(row, position=row.position + 1)
    with pytest.raises(AssertionError, match="two tokens of a sequence are late"):
        driver.engine._scheduler.schedule(0.0, behind=dataclasses.replace(flight.plan, rows=[two_on]))


def test_the_number_of_an_ended_sequence_is_not_reused_while_it_has_a_row_in_flight() -> None:
    driver = ahead()
    driver.add("a", [1, 2, 3], max_tokens=30)
    driver.step(3)
    (row,) = driver.runner.plans[-1].rows
    driver.engine.handle([Abort(request_id="a")])
    driver.add("b", [1, 2, 3], max_tokens=3)
    driver.step()
    assert {other.sequence_id for other in driver.runner.plans[-1].rows}.isdisjoint({row.sequence_id})
    finish(driver)


def test_a_step_behind_one_that_ran_out_of_memory_is_dropped() -> None:
    runner = RecordingRunner()
    driver = Driver(runner=runner, schedule_ahead=True)
    driver.add("a", [1, 2], max_tokens=9)
    driver.add("b", [3, 4], max_tokens=9)
    launches = 0

    def fail_once(plan: StepPlan) -> bool:
        nonlocal launches
        launches += 1
        return launches == 4

    driver.runner.out_of_memory = fail_once
    finish(driver)
    assert launches > 4
    kinds = [kind for kind, _ in runner.log]
    assert kinds.count("launch") == kinds.count("result"), "the dropped step was not waited for"
    assert {transcript.done.status for transcript in driver.requests.values() if transcript.done} == {"finished"}


def test_a_late_row_is_retried_with_its_token() -> None:
    driver = ahead()
    driver.add("a", [1, 2], max_tokens=9)
    driver.add("b", [3, 4], max_tokens=9)
    driver.runner.out_of_memory = lambda plan: len(plan.rows) > 1 and any(len(row.history) > 3 for row in plan.rows)
    finish(driver)
    assert {transcript.done.status for transcript in driver.requests.values() if transcript.done} == {"finished"}
    assert any(len(plan.rows) == 1 for plan in driver.runner.plans)


def test_a_late_row_whose_request_has_ended_is_not_retried() -> None:
    driver = ahead(delay=0)
    driver.put("v")
    driver.add("bad", [1, 2], max_tokens=9, n=2, version="v")
    driver.add("good", [3, 4], max_tokens=9)
    driver.step(4)
    # The request ends by its first row, so its second never learns its token; the step behind runs out of memory.
    driver.runner.non_finite_paths.add("/v")
    driver.step()
    failures = iter([True])
    driver.runner.out_of_memory = lambda plan: next(failures, False)
    finish(driver)
    assert next(failures, None) is None, "the fault was never reached"
    status = {name: transcript.done.status for name, transcript in driver.requests.items() if transcript.done}
    assert status == {"bad": "failed", "good": "finished"}


def test_shutting_down_takes_in_the_step_in_flight() -> None:
    runner = RecordingRunner()
    driver = Driver(runner=runner, schedule_ahead=True)
    driver.add("r", [1, 2, 3], max_tokens=9, n=2)
    driver.step(3)
    driver.engine.handle([Shutdown()])
    driver.step()
    assert not driver.engine.has_work
    driver.assert_at_rest()
    assert runner.log[-1] == ("result", runner.plans[-1].step), "nothing is launched any more, nothing is left"


def test_a_pool_without_room_makes_it_wait_and_preempt() -> None:
    driver = ahead(pages=9, page_size=2)
    for number in range(4):
        driver.add(f"r{number}", [number, 1, 2], max_tokens=7)
    finish(driver)
    assert driver.engine.stats().preemptions > 0


def test_sequences_fork_after_one_prefill() -> None:
    driver = ahead(prefill_chunk=3)
    request = driver.add("r", list(range(10)), max_tokens=4, n=3)
    finish(driver)
    assert request.done is not None
    assert request.done.computed_tokens == 9 + 3 + sum(len(tokens) - 1 for tokens in request.tokens.values())


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_fault_drops_the_step_behind_it(nth: int) -> None:
    runner = FakeRunner()
    driver = Driver(
        runner=FaultyRunner(runner, Faults(oom_prefill=nth)),  # type: ignore[arg-type]
        schedule_ahead=True,
        prefill_chunk=4,
    )
    driver.runner = runner
    driver.add("a", [1, 2], max_tokens=9)
    driver.step(2)
    driver.add("b", list(range(10)), max_tokens=9, n=2)
    launched: list[StepPlan] = []
    inner = runner.launch

    def launch(plan: StepPlan) -> StepHandle:
        launched.append(plan)
        return inner(plan)

    runner.launch = launch  # type: ignore[method-assign]
    finish(driver)
    assert {transcript.done.status for transcript in driver.requests.values() if transcript.done} == {"finished"}
    steps = [plan.step for plan in launched]
    assert all(plan.behind in (0, before) for plan, before in zip(launched[1:], steps, strict=False)), (
        "a step was launched behind one that did not run"
    )
