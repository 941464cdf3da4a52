"""Runs a server: in a process that does more, or as a process with the line that says where, signals, exit codes."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Mapping

from loramux_server.app import App
from loramux_server.config import ServerConfig, is_loopback
from loramux_server.engine.footprint import memory_table
from loramux_server.engine_process import LaunchEngine
from loramux_server.lora.uploads import AdapterValidator
from loramux_server.supervisor import CrashLoop

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serve(
    config: ServerConfig,
    *,
    version: str | None = None,
    launch: LaunchEngine | None = None,
    validator: AdapterValidator | None = None,
) -> AsyncIterator[App]:
    """Run a server inside this process and event loop, ready to serve.

    Args:
        config: Settings.
        version: Of the software; None = the installed one.
        launch: Starts engines; None = engine processes.
        validator: Checks uploads; None = the worker process.

    Yields:
        The running server, once its engine is ready.

    Raises:
        ServeError: It cannot start as configured.
    """
    app = App(config, version=version, launch=launch, validator=validator)
    await app.start()
    try:
        await _until_ready(app)
        yield app
    finally:
        await app.stop()


async def run_until_stopped(
    config: ServerConfig, *, version: str | None = None, launch: LaunchEngine | None = None
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Args:
        config: Settings.
        version: Of the software; None = the installed one.
        launch: Starts engines; None = engine processes.

    Returns:
        The exit code: 0, or 1 when the engine cannot be kept alive.

    Raises:
        ServeError: It cannot start as configured.
    """
    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    app = App(config, version=version, launch=launch)
    await app.start()
    stopped = asyncio.create_task(signals.get())
    failed = asyncio.create_task(app.wait())
    ready = asyncio.create_task(app.ready.wait())
    try:
        await asyncio.wait((stopped, failed, ready), return_when=asyncio.FIRST_COMPLETED)
        if ready.done() and not failed.done():
            _warn_about_access(config)
            print(banner(f"{config.host}:{app.port}", app.last_ready().details), flush=True)
            await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            try:
                failed.result()
            except CrashLoop as error:
                _log.critical("%s", error)
                return 1
        again = asyncio.create_task(signals.get())
        drained = asyncio.create_task(app.drain())
        await asyncio.wait((again, drained), return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        drained.cancel()
        return 0
    finally:
        for task in (stopped, failed, ready):
            task.cancel()
        await app.stop()
        await asyncio.gather(stopped, failed, ready, return_exceptions=True)


def banner(address: str, details: Mapping[str, str]) -> str:
    """What is printed once the server serves: the line with its address first, then memory, predicted and actual.

    Args:
        address: Of the gRPC listener.
        details: Of the engine's `Ready`.
    """
    return "\n".join([f"loramux serving on {address}", *filter(None, [memory_table(details)])])


def _warn_about_access(config: ServerConfig) -> None:
    if config.tls_client_ca is not None:
        _log.warning("whoever holds a certificate of --tls-client-ca %s is the tenant `default`", config.tls_client_ca)
    elif is_loopback(config.host):
        _log.warning("no credentials are asked for: every caller on this machine is the tenant `default`")
    elif config.tls_cert is not None:
        _log.warning(
            "listening on %s without credentials, as asked for: whoever reaches it is the tenant `default`", config.host
        )
    else:
        _log.warning(
            "listening on %s without TLS and without credentials, as asked for: whoever reaches it is the tenant "
            "`default`, and can read and change what it sends",
            config.host,
        )


async def _until_ready(app: App) -> None:
    """Wait for the first engine, or raise what ended it."""
    ready = asyncio.create_task(app.ready.wait())
    failed = asyncio.create_task(app.wait())
    try:
        await asyncio.wait((ready, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
    finally:
        for task in (ready, failed):
            task.cancel()
        await asyncio.gather(ready, failed, return_exceptions=True)
