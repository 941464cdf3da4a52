"""Engine processes: how they are started, how they tell what went wrong, how their log joins ours.

The engine is executed, never forked into (`python -m loramux_server.engine`), on an inherited socket pair whose EOF
tells it that its parent died. It gets a session of its own, so that Ctrl-C reaches the front end only, which drains.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from loramux_server.config import ServerConfig
from loramux_server.engine.config import EngineConfig

_log = logging.getLogger("loramux_server.engine")

STARTUP_ERROR_EXIT = 3
_MAX_LOG_LINE = 64 * 1024
_COMMAND = (sys.executable, "-m", "loramux_server.engine")
_MAX_HELD = 64


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
                _log.warning("dropped an engine log line of more than %d bytes", _MAX_LOG_LINE)
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
                _log.info("%s", line)
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
    logging.getLogger(str(entry.get("logger", _log.name))[:100]).log(level, "%s", text)


def engine_config(config: ServerConfig, model: Path) -> EngineConfig:
    """Settings of the engine for settings of the server.

    Args:
        config: Of the server.
        model: Directory of the base.
    """
    return EngineConfig(
        model=str(model),
        weights=config.weights,
        device=config.device,
        max_model_len=config.max_model_len,
        kv_pages=config.kv_pages,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_running=config.max_running,
        max_batch_tokens=config.max_batch_tokens,
        prefix_cache=config.prefix_cache,
        max_rank=config.max_rank,
        rank_units=config.rank_units,
        max_slots=config.max_slots,
        host_adapter_bytes=None if config.host_adapter_gib is None else int(config.host_adapter_gib * 2**30),
        # Every version lies in the server's own store.
        serving_blobs=True,
        batch_invariant=config.batch_invariant,
        schedule_ahead=config.schedule_ahead,
        shadow=config.shadow,
        threads=config.threads,
        self_test=config.self_test,
    )


def launch_subprocess(config: EngineConfig, *, command: Sequence[str] = _COMMAND) -> LaunchEngine:
    """Return a launcher of engine processes.

    Args:
        config: Settings; the epoch is filled in for each process.
        command: Program and first arguments.
    """

    async def launch(epoch: int) -> EngineProcess:
        ours, theirs = socket.socketpair()
        try:
            settings = msgspec.json.encode(msgspec.structs.replace(config, epoch=epoch)).decode()
            process = await asyncio.create_subprocess_exec(
                *command,
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
