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
    for bad in ("explode:1", "oom_prefill:x", "load_fail", "load_fail:"):
        with pytest.raises(ValueError, match="fault point|invalid literal"):
            Faults.parse(bad)


def faulty(text: str) -> Driver:
    runner = FakeRunner()
    driver = Driver(runner=FaultyRunner(runner, Faults.parse(text)))  # type: ignore[arg-type]
    driver.runner = runner
    return driver


def test_out_of_memory_in_a_prefill_is_survived() -> None:
    driver = faulty("oom_prefill:1")
    driver.add("r", [1, 2, 3, 4, 5])
    driver.run()
    driver.judge()
    assert driver.requests["r"].done is not None and driver.requests["r"].done.status == "finished"


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
