"""The real server of the contract tests: a process of its own with a tiny random model on the CPU."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loramux import Client, LoramuxError
from tests.support.tiny_models import make_adapter, make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0


class RealServer:
    """A running server.

    Args:
        address: `host:port`.
        base: Directory of its model.
    """

    def __init__(self, address: str, base: Path) -> None:
        self.address = address
        self._base = base

    def write_adapter(self, directory: Path, seed: int) -> None:
        """Write an adapter for its model."""
        make_adapter(directory, self._base, rank=4, seed=seed)

    def long_generation(self) -> dict[str, Any]:
        """Options of a generation that takes a second or more, also on a fast machine."""
        return {"max_tokens": 1900, "ignore_eos": True}


def _free_port() -> int:
    """Find a port. Another process may take it before the server does; the server then ends and the test says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_serves(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask for its state until it says that it serves."""
    deadline = time.monotonic() + START_SECONDS
    with Client(address) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(LoramuxError):
                if client.status().state == "serving":
                    return
            time.sleep(0.1)
    raise RuntimeError(f"the server does not serve; its log ends with\n{log.read_text(errors='replace')[-4000:]}")


@contextlib.contextmanager
def running_server(directory: Path) -> Iterator[RealServer]:
    """Start a server in `directory` and stop it at the end."""
    base = make_checkpoint(directory / "base", "llama")
    address = f"127.0.0.1:{_free_port()}"
    log = directory / "log"
    command = [sys.executable, "-m", "loramux_server", "serve", "--model", str(base), "--weights", "fp32"]
    command += ["--device", "cpu", "--threads", "1", "--no-self-test", "--allow-unverified-adapters", "--grace", "1"]
    command += ["--store", str(directory / "store"), "--port", address.rpartition(":")[2]]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'client'}:{ROOT / 'server'}", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=directory)
    try:
        _wait_until_it_serves(address, process, log)
        yield RealServer(address, base)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
