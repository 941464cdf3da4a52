"""The real engine process with the fake runner: `python -m tests.support.fake_engine --fd N --config JSON`."""

import logging
import time

from loramux_server.engine.__main__ import end_process, main
from loramux_server.engine.config import EngineConfig
from tests.support.fake_runner import FakeRunner, build_fake_runner


class CheckpointMissing(Exception):
    pass


def build(config: EngineConfig) -> FakeRunner:
    if config.model == "missing":
        raise CheckpointMissing("config.json is missing")
    if config.model == "slow":
        logging.getLogger("fake").warning("building")
        time.sleep(60)
    return build_fake_runner(config)


if __name__ == "__main__":
    end_process(main(build=build))
