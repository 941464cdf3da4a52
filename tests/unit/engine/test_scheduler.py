from loramux_server.engine.plan import StepPlan
from tests.support.engine_driver import Driver, make_driver


def finish(driver: Driver) -> None:
    driver.run()
    driver.judge()
    driver.assert_at_rest()


def shape(plan: StepPlan) -> list[tuple[int, int]]:
    """(start, tokens) of each row."""
    return [(row.start, len(row.token_ids)) for row in plan.rows]


def started_order(driver: Driver) -> list[str]:
    return [event.request_id for event in driver.events if type(event).__name__ == "Started"]


def test_prompts_are_prefilled_in_chunks_and_only_the_last_is_sampled() -> None:
    driver = make_driver(prefill_chunk=5, max_batch_tokens=64)
    driver.add("r", list(range(12)), max_tokens=2)
    finish(driver)
    assert [shape(plan) for plan in driver.runner.plans] == [[(0, 5)], [(5, 5)], [(10, 2)], [(12, 1)]]
    assert [plan.rows[0].sample for plan in driver.runner.plans] == [False, False, True, True]


def test_decode_rows_come_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    driver = make_driver(prefill_chunk=100, max_batch_tokens=10)
    driver.add("a", [1, 2], max_tokens=9)
    driver.add("b", [3, 4], max_tokens=9)
    driver.step()
    driver.add("c", list(range(20)))
    driver.step()
    assert shape(driver.runner.plans[-1]) == [(2, 1), (2, 1), (0, 8)]
    driver.step()
    assert shape(driver.runner.plans[-1]) == [(3, 1), (3, 1), (8, 8)]
    finish(driver)


def test_decode_rows_that_do_not_fit_leave_the_prefill_budget_alone() -> None:
    driver = make_driver(prefill_chunk=100, max_batch_tokens=10)
    driver.add("a", [1, 2], max_tokens=9)
    driver.step()
    driver.step()
    assert shape(driver.runner.plans[-1]) == [(2, 1)]
    scheduler = driver.engine._scheduler
    scheduler.ran_out_of_memory(driver.runner.plans[-1])
    driver.add("c", list(range(40)))
    driver.step()
    assert shape(driver.runner.plans[-1]) == [(3, 1), (0, 9)]
    scheduler.ran_out_of_memory(driver.runner.plans[-1])
    driver.step()
    assert shape(driver.runner.plans[-1]) == [(4, 1), (9, 4)]
    finish(driver)


def test_rows_are_bounded() -> None:
    driver = make_driver(max_running=3)
    for number in range(5):
        driver.add(f"r{number}", [1, 2], max_tokens=3, seed=number)
    driver.step()
    assert len(driver.runner.plans[-1].rows) == 3
    assert driver.engine.stats().waiting == 2
    finish(driver)


def test_n_sequences_share_one_prefill_and_copy_the_partial_page() -> None:
    driver = make_driver(page_size=4)
    driver.add("r", list(range(11)), n=3, max_tokens=2)
    finish(driver)
    first, second, third = driver.runner.plans
    assert shape(first) == [(0, 10)] and not first.rows[0].sample
    assert shape(second) == [(10, 1)] * 3 and [row.choice for row in second.rows] == [0, 1, 2]
    assert [copy.tokens for copy in second.copies] == [2, 2]
    full = {tuple(row.pages[:2]) for row in second.rows}
    assert len(full) == 1 and len({row.pages[2] for row in second.rows}) == 3
    assert not third.copies
    done = driver.requests["r"].done
    assert done is not None and done.computed_tokens == 10 + 3 + 3


def test_a_prompt_that_fills_pages_is_forked_without_copies() -> None:
    driver = make_driver(page_size=4)
    driver.add("r", list(range(9)), n=2)
    driver.add("s", [7], n=2)
    finish(driver)
    assert not any(plan.copies for plan in driver.runner.plans)


def test_keys_take_turns() -> None:
    driver = make_driver(max_running=1)
    for number in range(3):
        driver.add(f"a{number}", [1], fairness_key="a", max_tokens=1)
    for number in range(2):
        driver.add(f"b{number}", [1], fairness_key="b", max_tokens=1)
    finish(driver)
    assert started_order(driver) == ["a0", "b0", "a1", "b1", "a2"]


def test_priority_orders_one_keys_requests_only() -> None:
    driver = make_driver(max_running=1)
    driver.add("a0", [1], fairness_key="a", max_tokens=1)
    driver.add("b0", [1], fairness_key="b", max_tokens=1)
    driver.add("a1", [1], fairness_key="a", max_tokens=1, priority=9)
    driver.add("a2", [1], fairness_key="a", max_tokens=1, priority=9)
    finish(driver)
    assert started_order(driver) == ["a1", "b0", "a2", "a0"]


def test_a_large_request_is_not_starved_of_pages_by_small_ones() -> None:
    driver = make_driver(pages=10, page_size=2, prefix_cache=False)
    driver.add("running", [1] * 8, max_tokens=6)
    driver.step()
    driver.add("large", [2] * 14, max_tokens=1)
    for number in range(8):
        driver.add(f"small{number}", [3], max_tokens=1)
    finish(driver)
    assert started_order(driver)[:2] == ["running", "large"]


def test_preemption_takes_the_newest_of_the_lowest_priority_and_recomputes() -> None:
    driver = make_driver(pages=12, page_size=2, prefix_cache=False, max_running=3)
    driver.add("first", [1] * 4, max_tokens=12, priority=0)
    driver.add("low", [2] * 4, max_tokens=12, priority=-1)
    driver.add("new", [3] * 4, max_tokens=12, priority=0)
    finish(driver)
    preempted = {name: t.done.preemptions for name, t in driver.requests.items() if t.done is not None}
    assert preempted["low"] > 0 and preempted["first"] == 0
    low = driver.requests["low"].done
    assert low is not None and low.computed_tokens > 4 + 11


def test_preemption_takes_from_the_key_served_most() -> None:
    driver = make_driver(pages=14, page_size=2, prefix_cache=False)
    driver.add("old", [1] * 6, max_tokens=16, fairness_key="greedy")
    driver.step(8)
    driver.add("new", [2] * 4, max_tokens=16, fairness_key="modest", weight=4.0)
    finish(driver)
    preempted = {name: t.done.preemptions for name, t in driver.requests.items() if t.done is not None}
    assert preempted["old"] > 0 and preempted["new"] == 0


def test_a_preempted_request_of_n_sequences_is_forked_again() -> None:
    driver = make_driver(pages=14, page_size=2, prefix_cache=False)
    driver.add("many", [1] * 5, n=3, max_tokens=6)
    driver.add("other", [2] * 5, max_tokens=12, priority=5)
    finish(driver)
    many = driver.requests["many"].done
    assert many is not None and many.preemptions > 0


def test_steps_are_deterministic() -> None:
    def history() -> list[StepPlan]:
        driver = make_driver(pages=16, page_size=2, max_batch_tokens=12, prefill_chunk=4, delay=1)
        driver.put("v", "w")
        for number in range(12):
            version = ["v", "w", None][number % 3]
            driver.add(f"r{number}", list(range(number, number + 7)), n=1 + number % 2, version=version)
        driver.run()
        return list(driver.runner.plans)

    first, second = history(), history()
    assert [shape(plan) for plan in first] == [shape(plan) for plan in second]
    assert [[row.pages for row in plan.rows] for plan in first] == [[row.pages for row in plan.rows] for plan in second]
