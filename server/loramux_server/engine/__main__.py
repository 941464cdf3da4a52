"""Entry point of the engine process: `python -m loramux_server.engine --fd N --config JSON`.

Exit codes: 0 after `Shutdown`, SIGTERM or the front end's death; 1 when a step failed; 3 when the engine could not
start. In the last case the last line on stderr is `{"startup_error": {"type": ..., "message": ...}}`.
"""

import argparse
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, Protocol

import msgspec

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.faults import VARIABLE, Faults, FaultyRunner
from loramux_server.engine.hangup import ended_by_hangup
from loramux_server.engine.json_log import log_json_to_stderr
from loramux_server.engine.loop import serve
from loramux_server.engine.messages import Ready
from loramux_server.engine.plan import Runner
from loramux_server.engine.transport import Channel

EXIT_STEP_FAILED = 1
EXIT_NOT_STARTED = 3

# A step that waited for the device gets the interpreter lock back this late while an adapter is read in another thread:
# at Python's 0.005 s, steps of 7 ms took 33 ms beside a busy thread; at this, 9 ms.
_SWITCH_INTERVAL = 0.0005

logger = logging.getLogger("loramux_server.engine")


class ReadyRunner(Runner, Protocol):
    """A runner that is warm and can describe itself."""

    @property
    def ready(self) -> Ready:
        """First event of the process."""
        ...


def physical_cores() -> int:
    """Physical cores that this process may use; hyperthreads slow matrix products down."""
    allowed = os.sched_getaffinity(0)
    cores: set[tuple[str, str]] = set()
    for cpu in allowed:
        base = f"/sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            with open(f"{base}/physical_package_id") as package, open(f"{base}/core_id") as core:
                cores.add((package.read().strip(), core.read().strip()))
        except OSError:
            return len(allowed)
    return len(cores)


def set_thread_environment(config: EngineConfig) -> None:
    """Set OpenMP's environment; must precede the first import of torch."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(physical_cores()))


def _build(config: EngineConfig) -> ReadyRunner:
    from loramux_server.engine.runner import build_runner

    return build_runner(config)


class _Termination:
    """SIGTERM as a flag and a readable descriptor. Before it exists, during start, SIGTERM ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)

    def fileno(self) -> int:
        return self._reader.fileno()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


def main(arguments: Sequence[str] | None = None, *, build: Callable[[EngineConfig], ReadyRunner] = _build) -> int:
    """Serve until told to stop.

    Args:
        arguments: Command line; None = `sys.argv`.
        build: Makes the runner.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m loramux_server.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited descriptor of the socket to the front end")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    options = parser.parse_args(arguments)
    log_json_to_stderr()
    # Ctrl-C reaches the whole process group; draining is the front end's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        config = msgspec.json.decode(options.config, type=EngineConfig)
        set_thread_environment(config)
        connection = socket.socket(fileno=options.fd)
        with ended_by_hangup(connection):
            runner = build(config)
        ready = runner.ready
        faults = os.environ.get(VARIABLE)
        engine = Engine.serving(config, FaultyRunner(runner, Faults.parse(faults)) if faults else runner, ready)
    except Exception as error:
        logger.exception("the engine could not start")
        print(json.dumps({"startup_error": {"type": type(error).__name__, "message": str(error)}}), file=sys.stderr)
        return EXIT_NOT_STARTED
    termination = _Termination()
    channel = Channel(connection, epoch=config.epoch, wakeup_fd=termination.fileno())
    sys.setswitchinterval(_SWITCH_INTERVAL)
    # What was made at start lives as long as the process: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    try:
        serve(engine, channel, ready, terminated=lambda: termination.requested)
    except Exception:
        logger.critical("the engine failed", exc_info=True)
        return EXIT_STEP_FAILED
    finally:
        channel.close()
    return 0


def end_process(code: int) -> NoReturn:
    """Exit at once: a loader thread or a broken device must not keep a finished engine alive."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end_process(main())
