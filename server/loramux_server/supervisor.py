"""Keeps one engine process alive: start, hand-over to the client, death, restart with back-off, crash-loop limit.

Requests are accepted once the engine is ready, the front end has prepared for it and it knows the adapters.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from loramux_server.engine import messages as wire
from loramux_server.engine_process import STARTUP_ERROR_EXIT, EngineProcess, LaunchEngine
from loramux_server.rpc.engine_client import EngineClient

_log = logging.getLogger(__name__)

_TERMINATE_GRACE_S = 5.0


class EngineStartupError(Exception):
    """The engine refused to start, and another try would end the same way; the message is for the operator."""


class CrashLoop(Exception):
    """The engine died too often; only a restart of the whole server, or its operator, can help."""


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
        prepare: Callable[[wire.Ready], Awaitable[None]],
        resync: Resync,
        on_serving: Callable[[bool], Awaitable[None]],
        on_restart: Callable[[], None],
        policy: RestartPolicy = RestartPolicy(),  # noqa: B008 - frozen
    ) -> None:
        """Create a supervisor that runs nothing yet.

        Args:
            client: Attached to each engine in turn.
            launch: Starts the engine of an epoch.
            prepare: Awaited for each engine before requests are accepted.
            resync: Commands that bring a fresh engine to the registry's state.
            on_serving: Called when requests begin and stop to be accepted.
            on_restart: Called when an engine has died.
            policy: Back-off and crash-loop limit.
        """
        self._client = client
        self._launch = launch
        self._prepare = prepare
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
        """Ask the engine to end, then end it; one that still starts has nothing to lose and reads no command."""
        self._stopping = True
        starting = not self._client.serving
        self._client.shutdown()
        process = self._process
        if process is None:
            return
        if starting:
            process.kill()
        try:
            async with asyncio.timeout(_TERMINATE_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _run_epoch(self, epoch: int) -> str:
        """Run one engine to its end and return why it ended."""
        try:
            process = await self._launch(epoch)
        except OSError as error:  # out of descriptors, processes or memory: that may pass, and counts as a death
            why = f"its process could not be started: {error.strerror or type(error).__name__}"
            _log.error("engine %d: %s", epoch, why)
            return why
        self._process = process
        why = "the engine ended while it started"
        try:
            await self._client.attach(process.sock, epoch)
            try:
                ready = await self._client.wait_ready()
                process.started()
                _log.info("engine %d is ready: %s", epoch, json.dumps(msgspec.to_builtins(ready), default=str))
                await self._prepare(ready)
                self._client.open(self._resync())
                await self._on_serving(True)
                why = await self._client.wait_lost()
                if self._client.hung:
                    process.kill()
            except ConnectionError as error:
                why = str(error)
        finally:
            self._client.detach("the engine is restarting" if not self._stopping else "the server is shutting down")
            await self._on_serving(False)
            code = await self._reap(process)
            self._process = None
        if self._stopping:
            return why
        if epoch == 1 and code == STARTUP_ERROR_EXIT:
            raise EngineStartupError(process.startup_error or "the engine could not start; see its log lines above")
        _log.error("engine %d ended with exit code %d: %s", epoch, code, why)
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
