"""The server as an operator runs it: `python -m loramux_server serve` on a tiny random model, as a process."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loramux import Client

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 110.0
_SERVING = re.compile(r"loramux serving on (\S+)")
_PROBE = re.compile(r"probe listens on (\S+?:\d+)")

CommandLine = list[str]


def environment(**changes: str) -> dict[str, str]:
    """Environment of a server: the source tree on the path, one thread, nothing of the caller's own settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("LORAMUX_", "OTEL_"))}
    path = os.pathsep.join([str(ROOT / "client"), str(ROOT / "server")])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def command(*flags: str) -> CommandLine:
    """The command line of `serve`."""
    return [sys.executable, "-m", "loramux_server", "serve", *flags]


def children_of(pid: int) -> dict[int, str]:
    """Direct children of a process that have not ended, with their command lines."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found[int(entry.name)] = line
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 30.0) -> float:
    """Wait for a condition and return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"after {seconds:g} s: not {what}"
        time.sleep(0.02)
    return time.monotonic() - began


class RealServer:
    """One running server process.

    Attributes:
        address: `host:port` of its gRPC listener.
        process: The front end.
        log: Lines of its stderr so far, the engine's and the worker's included.
    """

    def __init__(self, *flags: str, **variables: str) -> None:
        """Start it; `wait_ready` waits until it serves.

        Args:
            *flags: Flags of `serve`, besides port and probe, which are picked by the system.
            **variables: Further environment.
        """
        self.address = ""
        self.log: list[str] = []
        self._probe = ""
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command("--port", "0", "--probe", "127.0.0.1:0", *flags),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**variables),
            text=True,
        )
        self._output: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self._output), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.log), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: Any, lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                lines.append(line.rstrip("\n"))

    def wait_ready(self) -> "RealServer":
        """Wait for the line that tells that it serves."""
        deadline = time.monotonic() + START_SECONDS
        while not self.address:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not serving, exit code {self.process.returncode}\n" + self.log_text()[-6000:])
            for line in list(self._output):
                if match := _SERVING.search(line):
                    self.address = match[1]
            time.sleep(0.02)
        probe = [match[1] for line in list(self.log) if (match := _PROBE.search(line))]
        assert probe, "the log names the probe's address"
        self._probe = probe[0]
        return self

    def log_text(self) -> str:
        """Everything that it and its children have logged."""
        return "\n".join(list(self.log))

    def http(self, path: str) -> str:
        """Body of an HTTP answer of the probe listener."""
        with urllib.request.urlopen(f"http://{self._probe}{path}", timeout=10) as answer:  # noqa: S310 - our own
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        """Every series at /metrics, by name with labels."""
        series: dict[str, float] = {}
        for line in self.http("/metrics").splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                series[name] = float(value)
        return series

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the series of a name that carry all of the labels."""
        return sum(
            value
            for series, value in self.metrics().items()
            if series.split("{")[0] == name and all(f'{key}="{text}"' in series for key, text in labels.items())
        )

    def child(self, module: str) -> int | None:
        """Process id of the child that runs a module; None if there is none."""
        found = [pid for pid, line in children_of(self.process.pid).items() if module in line]
        return found[0] if found else None

    @property
    def engine(self) -> int:
        """Process id of the engine."""
        pid = self.child("loramux_server.engine")
        assert pid is not None, "the engine runs"
        return pid

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the front end at once."""
        self.process.kill()

    def wait(self, seconds: float = 40.0) -> int:
        """Wait for the end of the front end and return its exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        return code

    def stop(self) -> None:
        """End it, whatever state it is in, and leave no child behind."""
        children = children_of(self.process.pid) if self.process.poll() is None else {}
        if self.process.poll() is None:
            self.terminate()
            try:
                self.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def real_server(model: Path, store: Path, *flags: str, **variables: str) -> Iterator[RealServer]:
    """Run a server of a checkpoint in fp32 on the CPU until the block ends.

    Args:
        model: The checkpoint.
        store: Directory of the store; created if missing.
        *flags: Further flags.
        **variables: Further environment.
    """
    server = RealServer(
        "--model",
        str(model),
        "--store",
        str(store),
        "--weights",
        "fp32",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--no-self-test",
        "--allow-unverified-adapters",
        *flags,
        **variables,
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def publish(server: RealServer, adapters: Mapping[str, Path], *names: str) -> None:
    """Upload adapters under their own names and give them all traffic."""
    with Client(server.address) as client:
        for name in names:
            client.adapters.upload(adapters[name], name=name, promote=True)


def at_rest(metrics: Mapping[str, float]) -> dict[str, float]:
    """The series that have to come back to where they were when nothing runs."""
    names = (
        "loramux_requests_waiting",
        "loramux_requests_running",
        "loramux_requests_queued",
        "loramux_rpc_running",
        "loramux_kv_pages_used",
    )
    return {name: metrics.get(name, 0.0) for name in names}


async def eventually(condition: Callable[[], bool], what: str, *, seconds: float = 30.0) -> float:
    """`wait_until` for tests that hold open streams on the event loop."""
    return await asyncio.to_thread(wait_until, condition, what, seconds=seconds)


async def settled(server: RealServer, *, seconds: float = 30.0) -> float:
    """Wait until nothing runs, waits or holds a page, and return how long it took."""
    return await eventually(lambda: not any(at_rest(server.metrics()).values()), "at rest", seconds=seconds)


def log_entries(server: RealServer) -> list[dict[str, Any]]:
    """The JSON lines of its log."""
    return [json.loads(line) for line in list(server.log) if line.startswith("{")]
