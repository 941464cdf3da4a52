"""A whole server process whose engine process runs the real loop on the fake runner: no torch, a fast start.

`python -m tests.support.fake_engine_server BASE STORE [FLAG=VALUE ...]`
"""

import asyncio
import sys
from pathlib import Path

from loramux_server.engine.config import EngineConfig
from loramux_server.engine_process import launch_subprocess
from loramux_server.run import run_until_stopped
from loramux_server.startup import ServeError
from loramux_server.telemetry.json_log import configure_logging
from tests.support.front_end import make_config

ENGINE = """
import sys
from loramux_server.engine.__main__ import main
from tests.support.fake_runner import build_fake_runner

def build(config):
    if config.kv_pages == 7:
        raise ValueError("7 pages do not hold one request; raise --kv-pages")
    return build_fake_runner(config)

sys.exit(main(build=build))
"""


def main() -> int:
    root = Path(sys.argv[1])
    settings = dict(argument.split("=", 1) for argument in sys.argv[2:])
    engine = EngineConfig(model=str(root / "base"), kv_pages=int(settings.get("kv_pages", "255")))
    configure_logging("info")
    try:
        return asyncio.run(
            run_until_stopped(
                make_config(root, **settings),
                version="test",
                launch=launch_subprocess(engine, command=(sys.executable, "-c", ENGINE)),
            )
        )
    except ServeError as error:
        print(f"loramux-server: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
