import pytest

from loramux_server.engine.faults import Faults, FaultyRunner
from loramux_server.engine.messages import PutVersion
from tests.support.engine_driver import Driver, version
from tests.support.fake_runner import FakeRunner


def test_parse() -> None:
    assert Faults.parse("") == Faults()
    assert Faults.parse("oom_prefill:2, slow_step:5,load_fail:/v") == Faults(
        oom_prefill=2, slow_step=0.005, load_fail="/v"
    )
    everything = Faults.parse("oom_above:9,oom_prompt:3,oom_output:4,device_assert:7,die_after_steps:8")
    assert everything == Faults(oom_above=9, oom_prompt=3, oom_output=4, device_assert=7, die_after_steps=8)
    for bad in ("explode:1", "oom_prefill:x", "slow_step:", "load_fail", "load_fail:"):
        with pytest.raises(ValueError, match=f"LORAMUX_FAULT: '{bad}' is not a fault point"):
            Faults.parse(bad)


def faulty(text: str, **config: object) -> Driver:
    runner = FakeRunner()
    driver = Driver(runner=FaultyRunner(runner, Faults.parse(text)), **config)  # type: ignore[arg-type]
    driver.runner = runner
    return driver


def statuses(driver: Driver) -> dict[str, str]:
    done = {name: transcript.done for name, transcript in driver.requests.items()}
    return {
        name: "never ended" if end is None else end.status if end.error is None else end.error.reason
        for name, end in done.items()
    }


def test_out_of_memory_in_a_prefill_is_survived() -> None:
    driver = faulty("oom_prefill:1")
    driver.add("r", [1, 2, 3, 4, 5])
    driver.run()
    driver.judge()
    assert driver.requests["r"].done is not None and driver.requests["r"].done.status == "finished"


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_above_a_size_run_out_of_memory_after_they_have_run(ahead: bool) -> None:
    driver = faulty("oom_above:3", schedule_ahead=ahead)
    for index in range(6):
        driver.add(str(index), [10 * index + k for k in range(1, 4 + index)], n=1 + index % 2)
    driver.run()
    driver.judge()
    driver.assert_at_rest()
    assert set(statuses(driver).values()) == {"finished"}
    assert max(plan.num_tokens for plan in driver.runner.plans) > 3, "a step that fails has run"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_and_an_output_that_always_run_out_of_memory_fail_alone(ahead: bool) -> None:
    driver = faulty("oom_prompt:50,oom_output:51,oom_above:6", schedule_ahead=ahead)
    for index in range(6):
        driver.add(str(index), [index, 2, 3, 4], n=1 + index % 2, max_tokens=8)
    driver.add("prompt", [9, 50, 2, 3, 4], max_tokens=8)
    driver.add("prompt of one token", [50], max_tokens=8)
    driver.add("output", [9, 51, 3], max_tokens=8)
    driver.run()
    driver.judge()
    driver.assert_at_rest()
    victims = {"prompt", "prompt of one token", "output"}
    expected = {name: "OUT_OF_MEMORY" if name in victims else "finished" for name in driver.requests}
    assert statuses(driver) == expected
    assert not driver.requests["prompt"].tokens and len(driver.requests["output"].tokens[0]) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_everything_runs_out_of_memory_for_ever(ahead: bool) -> None:
    driver = faulty("oom_above:0", schedule_ahead=ahead)
    for index in range(6):
        driver.add(str(index), list(range(40)), n=1 + index % 2)
    driver.run(limit=100)
    driver.assert_at_rest()
    assert set(statuses(driver).values()) == {"OUT_OF_MEMORY"}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_broken_context_ends_the_engine(ahead: bool) -> None:
    driver = faulty("device_assert:3", schedule_ahead=ahead)
    driver.add("r", [1, 2], max_tokens=20)
    driver.step(2)
    with pytest.raises(RuntimeError, match="device-side assert"):
        driver.step()
    assert len(driver.requests["r"].tokens[0]) == 2, "what was launched before is out"


def test_a_load_fails() -> None:
    driver = faulty("load_fail:/bad")
    driver.engine.handle([PutVersion(spec=version("bad")), PutVersion(spec=version("good"))])
    driver.add("b", [1, 2], version="bad")
    driver.add("g", [1, 2], version="good")
    driver.run()
    driver.judge()
    done = {name: transcript.done for name, transcript in driver.requests.items()}
    assert done["b"] is not None and done["b"].error is not None and done["b"].error.reason == "STORE_UNAVAILABLE"
    assert done["g"] is not None and done["g"].status == "finished"


def test_a_step_fails() -> None:
    driver = faulty("die_after_steps:2")
    driver.add("r", [1, 2])
    driver.step(2)
    with pytest.raises(RuntimeError, match="die_after_steps"):
        driver.step()
