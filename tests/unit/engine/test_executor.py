from collections.abc import Callable

from loramux_server.engine.plan import StepPlan
from tests.support.engine_driver import Driver, make_driver


def statuses(driver: Driver) -> dict[str, str]:
    out: dict[str, str] = {}
    for name, transcript in driver.requests.items():
        assert transcript.done is not None
        error = transcript.done.error
        out[name] = transcript.done.status if error is None else error.reason
    return out


def run(driver: Driver, out_of_memory: Callable[[StepPlan], bool]) -> None:
    driver.runner.out_of_memory = out_of_memory
    driver.run()
    driver.judge()
    driver.assert_at_rest()


def mixed(driver: Driver) -> None:
    driver.add("d1", [1, 2], max_tokens=20)
    driver.add("d2", [3, 4], max_tokens=20, n=2)
    driver.step(2)
    driver.add("p1", list(range(20)))
    driver.add("p2", list(range(30, 50)), version=None)


def test_a_device_of_two_tokens_serves_everything_in_small_pieces() -> None:
    driver = make_driver()
    mixed(driver)
    run(driver, lambda plan: plan.num_tokens > 2)
    assert set(statuses(driver).values()) == {"finished"}
    assert max(plan.num_tokens for plan in driver.runner.plans[2:]) == 2


def test_only_the_chunk_that_fails_alone_fails_its_request() -> None:
    driver = make_driver()
    mixed(driver)
    run(driver, lambda plan: any(row.history[:2] == [0, 1] for row in plan.rows))
    assert statuses(driver) == {"d1": "finished", "d2": "finished", "p1": "OUT_OF_MEMORY", "p2": "finished"}


def test_only_the_decode_row_that_fails_alone_fails_its_request() -> None:
    driver = make_driver()
    mixed(driver)
    run(driver, lambda plan: any(row.history[:2] == [3, 4] and len(row.history) > 8 for row in plan.rows))
    assert statuses(driver) == {"d1": "finished", "d2": "OUT_OF_MEMORY", "p1": "finished", "p2": "finished"}


def test_one_failure_repeats_the_step_without_a_trace() -> None:
    driver = make_driver()
    mixed(driver)
    failures = iter([True])
    run(driver, lambda plan: plan.num_tokens > 10 and next(failures, False))
    assert set(statuses(driver).values()) == {"finished"}
    assert next(failures, None) is None, "the fault was never reached"


def test_prefills_shrink_after_running_out_of_memory_and_grow_again() -> None:
    driver = make_driver(pages=255, prefill_chunk=64, max_batch_tokens=64)
    driver.add("a", list(range(60)) * 4, max_tokens=1)
    attempts: list[int] = []

    def fits(plan: StepPlan) -> bool:
        attempts.append(plan.num_tokens)
        return plan.num_tokens > 20

    run(driver, fits)
    refused = sum(tokens > 20 for tokens in attempts)
    assert refused <= 4, f"the device was asked for too much {refused} times: {attempts}"
    driver.runner.out_of_memory = lambda plan: False
    driver.add("b", list(range(50)), max_tokens=100)
    driver.run()
    driver.runner.plans.clear()
    driver.add("c", list(range(40)) * 4, max_tokens=1)
    driver.run()
    assert max(plan.num_tokens for plan in driver.runner.plans) == 64


def test_prompt_logprobs_are_complete_when_chunks_are_halved() -> None:
    driver = make_driver()
    driver.add("r", list(range(20)), prompt_logprobs=0)
    run(driver, lambda plan: plan.num_tokens > 3)
    assert statuses(driver) == {"r": "finished"}
