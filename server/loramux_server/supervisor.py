"""Keeps one engine process alive: start, hand-over to the client, death, restart with back-off, crash-loop limit.

The engine is executed, never forked into (`python -m loramux_server.engine`), on an inherited socket pair whose EOF
tells it that its parent died. It gets a session of its own, so that Ctrl-C reaches the front end only, which drains.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from loramux_server.engine import messages as wire
from loramux_server.engine.config import EngineConfig
from loramux_server.rpc.engine_client import EngineClient

_log = logging.getLogger(__name__)
_engine_log = logging.getLogger("loramux_server.engine")

STARTUP_ERROR_EXIT = 3
_MAX_LOG_LINE = 64 * 1024
_TERMINATE_GRACE_S = 5.0
_MAX_HELD = 64


class EngineStartupError(Exception):
    """The engine refused to start, and another try would end the same way; the message is for the operator."""


class CrashLoop(Exception):
    """The engine died too often; only a restart of the whole server, or its operator, can help."""


class EngineProcess(Protocol):
    """A running engine."""

    @property
    def sock(self) -> socket.socket:
        """Our end of the socket pair."""
        ...

    @property
    def startup_error(self) -> str | None:
        """Message of the startup error that the engine reported, if it did."""
        ...

    def started(self) -> None:
        """Learn that the engine is ready: its errors are no startup errors any more."""
        ...

    async def wait(self) -> int:
        """Wait for its end and return the exit code."""
        ...

    def kill(self) -> None:
        """End it at once. Idempotent."""
        ...


LaunchEngine = Callable[[int], Awaitable[EngineProcess]]
Resync = Callable[[], Sequence[wire.Command]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """When to give up.

    Attributes:
        first_delay: Seconds before the first restart; doubled each time.
        longest_delay: Bound of that.
        crashes: So many deaths ...
        window: ... in so many seconds are a crash loop.
    """

    first_delay: float = 0.25
    longest_delay: float = 5.0
    crashes: int = 5
    window: float = 60.0


class Supervisor:
    """Runs the engine until `stop`."""

    def __init__(
        self,
        client: EngineClient,
        launch: LaunchEngine,
        *,
        resync: Resync,
        on_serving: Callable[[bool], Awaitable[None]],
        on_restart: Callable[[], None],
        policy: RestartPolicy = RestartPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Create a supervisor that runs nothing yet.

        Args:
            client: Attached to each engine in turn.
            launch: Starts the engine of an epoch.
            resync: Commands that bring a fresh engine to the registry's state.
            on_serving: Called when requests begin and stop to be accepted.
            on_restart: Called when an engine has died.
            policy: Back-off and crash-loop limit.
        """
        self._client = client
        self._launch = launch
        self._resync = resync
        self._on_serving = on_serving
        self._on_restart = on_restart
        self._policy = policy
        self._deaths: deque[float] = deque()
        self._process: EngineProcess | None = None
        self._stopping = False
        self.crash_looping = False
        self.restarts = 0

    async def run(self) -> None:
        """Keep an engine running; returns after `stop`.

        Raises:
            EngineStartupError: The first engine reported a startup error.
            CrashLoop: The crash-loop limit was reached.
        """
        epoch = 0
        while not self._stopping:
            epoch += 1
            began = time.monotonic()
            why = await self._run_epoch(epoch)
            if self._stopping:
                return
            self.restarts += 1
            self._on_restart()
            await asyncio.sleep(self._back_off(began, why))

    async def stop(self) -> None:
        """Ask the engine to end, then end it."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self._client.shutdown()
        try:
            async with asyncio.timeout(_TERMINATE_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _run_epoch(self, epoch: int) -> str:
        """Run one engine to its end and return why it ended."""
        process = await self._launch(epoch)
        self._process = process
        why = "the engine ended while it started"
        try:
            await self._client.attach(process.sock, epoch)
            try:
                ready = await self._client.wait_ready()
                process.started()
                _log.info("engine %d is ready: %s", epoch, json.dumps(msgspec.to_builtins(ready), default=str))
                self._client.open(self._resync())
                await self._on_serving(True)
                why = await self._client.wait_lost()
            except ConnectionError as error:
                why = str(error)
        finally:
            self._client.detach("the engine is restarting" if not self._stopping else "the server is shutting down")
            await self._on_serving(False)
            code = await self._reap(process)
            self._process = None
        if not self._stopping:
            _log.error("engine %d ended with exit code %d: %s", epoch, code, why)
            if epoch == 1 and code == STARTUP_ERROR_EXIT:
                raise EngineStartupError(process.startup_error or "the engine could not start; see its log lines above")
        return why

    async def _reap(self, process: EngineProcess) -> int:
        try:
            async with asyncio.timeout(_TERMINATE_GRACE_S):
                return await process.wait()
        except TimeoutError:
            process.kill()
            return await process.wait()

    def _back_off(self, began: float, why: str) -> float:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - self._policy.window:
            self._deaths.popleft()
        if len(self._deaths) >= self._policy.crashes:
            self.crash_looping = True
            raise CrashLoop(
                f"the engine died {len(self._deaths)} times in {self._policy.window:g} s, the last time because {why}"
            )
        if now - began > self._policy.window:
            return self._policy.first_delay
        return min(self._policy.longest_delay, self._policy.first_delay * 2.0 ** (len(self._deaths) - 1))


class _SubprocessEngine:
    """An engine in a process of its own. Its log lines join ours.

    Lines with a stack are held back while it starts: when it then reports a startup error, that message says it all.
    """

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self.sock = sock
        self.startup_error: str | None = None
        self._process = process
        self._held: list[dict[str, Any]] | None = []
        self._log_task = asyncio.create_task(self._forward_log())

    def started(self) -> None:
        held, self._held = self._held, None
        for entry in held or ():
            _log_entry(entry)

    async def wait(self) -> int:
        code = await self._process.wait()
        await self._log_task
        if self.startup_error is None:
            self.started()
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _forward_log(self) -> None:
        reader = self._process.stderr
        assert reader is not None
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # a line over the limit; the reader has dropped it
                _engine_log.warning("dropped an engine log line of more than %d bytes", _MAX_LOG_LINE)
                continue
            if not line:
                return
            self._on_line(line.decode("utf-8", "replace").rstrip())

    def _on_line(self, line: str) -> None:
        try:
            entry = json.loads(line) if line.startswith("{") else None
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            if line:
                _engine_log.info("%s", line)
        elif isinstance(entry.get("startup_error"), dict):
            self.startup_error = str(entry["startup_error"].get("message"))
        elif "stack" in entry and self._held is not None and len(self._held) < _MAX_HELD:
            self._held.append(entry)
        else:
            _log_entry(entry)


def _log_entry(entry: dict[str, Any]) -> None:
    level = logging.getLevelNamesMapping().get(str(entry.get("level", "")).upper(), logging.INFO)
    text = str(entry.get("message", ""))
    if "stack" in entry:
        text += "\n" + str(entry["stack"])
    logging.getLogger(str(entry.get("logger", _engine_log.name))[:100]).log(level, "%s", text)


def launch_subprocess(config: EngineConfig) -> LaunchEngine:
    """Return a launcher of engine processes.

    Args:
        config: Settings; the epoch is filled in for each process.
    """

    async def launch(epoch: int) -> EngineProcess:
        ours, theirs = socket.socketpair()
        try:
            settings = msgspec.json.encode(msgspec.structs.replace(config, epoch=epoch)).decode()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "loramux_server.engine",
                "--fd",
                str(theirs.fileno()),
                "--config",
                settings,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                start_new_session=True,
                limit=_MAX_LOG_LINE,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return _SubprocessEngine(process, ours)

    return launch
