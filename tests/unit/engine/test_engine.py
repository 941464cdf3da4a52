"""A request's life as the front end sees it."""

import pytest

from loramux_server.engine.messages import Abort, Done, Ping, Pong, Preload, SamplingSpec, Shutdown, Stats, Stop, Tokens
from tests.support.engine_driver import Driver, finish, make_driver, reason
from tests.support.fake_runner import VOCAB_SIZE, FakeRunner, solo_output


class TestTokens:
    def test_each_step_gives_one_token_a_sequence_and_done_sums_up(self) -> None:
        driver = make_driver()
        request = driver.add("r", [1, 2, 3, 4, 5], max_tokens=3, n=2)
        finish(driver)
        events = [event for event in driver.events if isinstance(event, Tokens)]
        assert [(event.index, event.first) for event in events] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
        done = request.done
        assert done is not None and (done.status, done.prompt_tokens, done.output_tokens) == ("finished", 5, 6)
        assert isinstance([event for event in driver.events if not isinstance(event, Stats)][-1], Done)

    def test_end_tokens_end_but_not_before_min_tokens(self) -> None:
        alone = solo_output([1], SamplingSpec(max_tokens=20), "", 0)
        end = alone[3]
        driver = make_driver()
        stopped = driver.add("stopped", [1], max_tokens=20, eos_token_ids=[end])
        later = driver.add("later", [1], max_tokens=20, stop_token_ids=[end], min_tokens=6)
        ignored = driver.add("ignored", [1], max_tokens=20, eos_token_ids=[end], ignore_eos=True)
        finish(driver)
        assert stopped.finished[0].stop_token_id == end and stopped.tokens[0] == alone[:4]
        assert stopped.finished[0].tokens == 4
        assert later.finished[0].tokens >= 6
        assert ignored.tokens[0] == alone and ignored.finished[0].reason == "length"

    def test_output_ends_at_the_models_length(self) -> None:
        driver = make_driver(max_model_len=8)
        request = driver.add("r", [1] * 6, max_tokens=50)
        finish(driver)
        assert request.finished[0].reason == "length" and request.finished[0].tokens == 2

    def test_logprobs_come_with_the_tokens_only_when_asked(self) -> None:
        driver = make_driver()
        driver.add("with", [1], logprobs=0, max_tokens=2)
        driver.add("without", [1], max_tokens=2)
        finish(driver)
        counts = {e.request_id: len(e.logprobs) for e in driver.events if isinstance(e, Tokens)}
        assert counts == {"with": 1, "without": 0}

    def test_prompt_logprobs_are_complete_across_chunks_and_skip_the_cache(self) -> None:
        driver = make_driver(prefill_chunk=5)
        driver.add("warm", list(range(20)), max_tokens=1)
        driver.run()
        request = driver.add("r", list(range(20)), prompt_logprobs=2, n=2, max_tokens=1)
        finish(driver)
        assert len(request.prompt_logprobs) == 19
        assert request.started is not None and request.started.cached_tokens == 0


class TestStops:
    def test_a_stop_cuts_a_sequence_and_the_others_go_on(self) -> None:
        driver = make_driver()
        request = driver.add("r", [1], n=2, max_tokens=9)
        driver.step(5)
        driver.stop("r", 0, 2)
        finish(driver)
        assert (request.finished[0].reason, request.finished[0].tokens) == ("stop", 2)
        assert request.finished[0].stop_token_id is None
        assert request.done is not None and request.done.output_tokens == 2 + 9

    def test_a_stop_after_the_end_is_ignored(self) -> None:
        driver = make_driver()
        request = driver.add("r", [1], max_tokens=2, n=2)
        driver.run()
        driver.engine.handle([Stop(request_id="r", index=0, tokens=1), Stop(request_id="unknown", index=0, tokens=1)])
        finish(driver)
        assert request.finished[0].reason == "length"

    def test_a_stop_of_a_preempted_sequence_ends_it(self) -> None:
        driver = make_driver(pages=12, page_size=2, prefix_cache=False)
        request = driver.add("victim", [1] * 4, max_tokens=20, priority=-1)
        driver.add("winner", [2] * 4, max_tokens=20)
        for _ in range(20):
            if driver.engine.stats().preemptions:
                break
            driver.step()
        driver.stop("victim", 0, 1)
        driver.step()
        assert request.done is not None and request.done.status == "finished" and request.done.preemptions == 1
        finish(driver)


class TestCancellation:
    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_abort_frees_everything_at_once(self, steps: int) -> None:
        driver = make_driver(prefill_chunk=4)
        driver.put("v")
        request = driver.add("r", list(range(10)), n=2, version="v", max_tokens=50)
        driver.step(steps)
        driver.engine.handle([Abort(request_id="r"), Abort(request_id="r"), Abort(request_id="unknown")])
        driver.step()
        assert request.done is not None and request.done.status == "cancelled"
        driver.assert_at_rest()

    def test_a_repeated_id_is_ignored_also_after_the_end(self) -> None:
        driver = make_driver()
        request = driver.add("r", [1])
        driver.engine.handle([request.add])
        driver.run()
        driver.engine.handle([request.add])
        finish(driver)

    def test_shutdown_cancels_what_is_left_and_refuses_what_comes(self) -> None:
        driver = make_driver(delay=100)
        driver.put("v")
        requests = [driver.add("a", [1], max_tokens=50), driver.add("b", [1], version="v")]
        driver.engine.handle([Preload(operation_id="p", version="v")])
        driver.step(2)
        driver.engine.handle([Shutdown()])
        late = driver.add("late", [1])
        driver.step()
        assert [r.done.status for r in requests if r.done] == ["cancelled", "cancelled"]
        assert reason(late) == "DRAINING" and driver.engine.stopping
        error = driver.completed["p"].error
        assert error is not None and error.reason == "DRAINING"
        driver.assert_at_rest()


class TestTime:
    def test_a_deadline_ends_waiting_and_running_requests(self) -> None:
        driver = make_driver(max_running=1)
        running = driver.add("running", [1], max_tokens=60, time_left=5.0)
        waiting = driver.add("waiting", [1], max_tokens=60, time_left=3.0)
        driver.step(2)
        driver.clock.now += 3.0
        driver.step()
        assert reason(waiting) == "DEADLINE_EXCEEDED" and waiting.started is None and running.done is None
        driver.clock.now += 2.0
        finish(driver)
        assert reason(running) == "DEADLINE_EXCEEDED"

    def test_a_request_late_on_arrival_costs_no_step(self) -> None:
        driver = make_driver()
        request = driver.add("r", [1], time_left=0.0)
        finish(driver)
        assert reason(request) == "DEADLINE_EXCEEDED" and not driver.runner.plans

    def test_a_soft_limit_keeps_what_there_is(self) -> None:
        driver = make_driver(max_running=2)
        request = driver.add("r", [1], n=2, max_tokens=60, soft_time_limit=1.0)
        never = driver.add("never", [1], max_tokens=60, soft_time_limit=1.0)
        driver.step(3)
        driver.clock.now += 1.0
        finish(driver)
        assert {end.reason for end in request.finished.values()} == {"time_limit"}
        assert request.done is not None and request.done.output_tokens == 6
        assert reason(never) == "DEADLINE_EXCEEDED"

    def test_times_are_those_of_the_clock(self) -> None:
        driver = make_driver()
        request = driver.add("r", [1], max_tokens=3)
        driver.clock.now += 1.0
        driver.step()
        driver.clock.now += 4.0
        finish(driver)
        done, started = request.done, request.started
        assert done is not None and started is not None
        assert (started.queue_time, done.prefill_time, done.decode_time) == (1.0, 0.0, 4.0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"prompt": []}, "INVALID_PARAMETER"),
            ({"prompt": [-1]}, "INVALID_PARAMETER"),
            ({"prompt": [VOCAB_SIZE]}, "INVALID_PARAMETER"),
            ({"prompt": [1], "max_tokens": 0}, "INVALID_PARAMETER"),
            ({"prompt": [1], "n": 0}, "INVALID_PARAMETER"),
            ({"prompt": [1], "n": 5}, "INVALID_PARAMETER"),
            ({"prompt": [1], "n": 4, "max_tokens": 60}, "INVALID_PARAMETER"),
            ({"prompt": [1], "weight": 0.0}, "INVALID_PARAMETER"),
            ({"prompt": [1] * 64}, "PROMPT_TOO_LONG"),
            ({"prompt": [1], "version": "unknown"}, "ADAPTER_NOT_FOUND"),
            ({"prompt": [1], "alias": "unknown"}, "ADAPTER_NOT_FOUND"),
            ({"prompt": [1], "alias": "empty"}, "ADAPTER_NOT_FOUND"),
        ],
    )
    def test_answered_at_once(self, fields: dict[str, object], expected: str) -> None:
        driver = Driver(runner=FakeRunner(num_pages=17, page_size=4), max_running=4, vocab_size=VOCAB_SIZE)
        driver.alias("empty")
        request = driver.add("r", **fields)  # type: ignore[arg-type]
        good = driver.add("good", [1])
        finish(driver)
        assert reason(request) == expected and request.started is None
        assert good.done is not None and good.done.status == "finished"

    def test_the_longest_request_runs(self) -> None:
        driver = make_driver(pages=16, page_size=4)
        request = driver.add("r", [1] * 30, max_tokens=1000)
        many = driver.add("many", [1] * 33, max_tokens=8, n=4)
        finish(driver)
        assert request.finished[0].tokens == 34
        assert many.done is not None and many.done.status == "finished"

    def test_non_finite_rows_end_alone_and_leave_no_cached_page(self) -> None:
        driver = make_driver()
        driver.put("bad")
        driver.runner.non_finite_paths.add("/bad")
        bad = driver.add("bad", list(range(20)), version="bad")
        good = driver.add("good", list(range(20)))
        finish(driver)
        assert reason(bad) == "ADAPTER_NUMERICS" and good.done is not None and good.done.status == "finished"
        driver.runner.non_finite_paths.clear()
        again = driver.add("again", list(range(20)), version="bad")
        finish(driver)
        assert again.started is not None and again.started.cached_tokens == 0
        driver.runner.non_finite_paths.add("")
        base = driver.add("base", [1])
        finish(driver)
        assert reason(base) == "INTERNAL"

    def test_any_other_failure_leaves_the_engine(self) -> None:
        driver = make_driver()
        driver.runner.broken = RuntimeError("device lost")
        driver.add("r", [1])
        with pytest.raises(RuntimeError, match="device lost"):
            driver.step()


def test_stats_come_when_idle_begins_and_at_most_four_times_a_second() -> None:
    driver = make_driver()
    driver.add("r", [1], max_tokens=30)
    driver.step(10)
    assert sum(isinstance(event, Stats) for event in driver.events) == 1
    driver.clock.now += 0.25
    driver.step(5)
    assert sum(isinstance(event, Stats) for event in driver.events) == 2
    driver.run()
    stats = [event for event in driver.events if isinstance(event, Stats)]
    assert len(stats) == 3 and stats[-1].requests_finished == 1 and stats[-1].running == 0
    assert not driver.engine.has_work and driver.engine.step() == []


def test_a_ping_is_answered_without_work() -> None:
    driver = make_driver()
    driver.engine.handle([Ping()])
    assert driver.engine.has_work
    driver.step()
    assert driver.events[0] == Pong() and not driver.engine.has_work
