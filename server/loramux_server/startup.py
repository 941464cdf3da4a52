"""Opens the parts of a server that may turn out to be unusable, and says so in one line for the operator."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from loramux_server.config import ServerConfig
from loramux_server.lora.directory_source import DirectorySource
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.uploads import AdapterValidator
from loramux_server.lora.validation import ServedBase, ValidationWorker
from loramux_server.rpc.certificate import CertificateError, CertificateFiles
from loramux_server.rpc.engine_client import EngineClient
from loramux_server.rpc.tls import TlsRotation
from loramux_server.tenancy.database import RegistryError
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore, StoreError


class ServeError(Exception):
    """The server cannot start as configured; the message is one line for the operator."""


async def open_adapters(
    config: ServerConfig,
    model: Path,
    engine: EngineClient,
    *,
    base: Callable[[], ServedBase],
    validator: AdapterValidator | None,
    cleanup: contextlib.AsyncExitStack,
) -> AdapterLifecycle:
    """Open store and registry, start the life cycle over them.

    Args:
        config: Settings.
        model: Directory of the base.
        engine: Where versions are served.
        base: Gives the base that is served, once it is known.
        validator: Of uploads; None = a worker process.
        cleanup: Takes what has to be closed.

    Raises:
        ServeError: Store or registry cannot be used.
    """
    root = Path(config.store)
    try:
        store = await asyncio.to_thread(LocalStore, root)
    except StoreError as error:
        raise ServeError(f"--store {root}: {error}") from error
    try:
        registry = await asyncio.to_thread(Registry, root / "registry.db")
    except RegistryError as error:
        store.close()
        raise ServeError(f"--store {root}: {error}") from error
    if validator is None:
        validator = worker = ValidationWorker(
            model / "config.json",
            max_rank=config.max_rank,
            base=base,
            allow_unverified=config.allow_unverified_adapters,
        )
        cleanup.push_async_callback(worker.close)
    lifecycle = AdapterLifecycle(registry, store, validator, engine, allow_unverified=config.allow_unverified_adapters)
    cleanup.push_async_callback(lifecycle.close)
    await lifecycle.start()
    return lifecycle


async def open_source(
    config: ServerConfig, lifecycle: AdapterLifecycle, *, on_first_scan: Callable[[], Awaitable[None]]
) -> DirectorySource | None:
    """Begin to follow the operator's directory of adapters; None if there is none.

    Args:
        config: Settings.
        lifecycle: Takes what is found.
        on_first_scan: Called when the first scan is over.

    Raises:
        ServeError: It cannot be read.
    """
    if config.adapters is None:
        return None
    state = Path(config.store) / "directory.json"
    source = DirectorySource(Path(config.adapters), lifecycle, state, on_first_scan=on_first_scan)
    try:
        await source.open()
    except OSError as error:
        raise ServeError(
            f"--adapters {config.adapters}: it cannot be read ({error.strerror}); make it, or name another"
        ) from error
    return source


async def open_certificate(config: ServerConfig, cleanup: contextlib.AsyncExitStack) -> TlsRotation | None:
    """Read and prove the certificate and begin to follow its files; None without TLS.

    Args:
        config: Settings.
        cleanup: Takes what has to be closed.

    Raises:
        ServeError: The files cannot serve.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    files = CertificateFiles(
        cert=Path(config.tls_cert),
        key=Path(config.tls_key),
        client_ca=None if config.tls_client_ca is None else Path(config.tls_client_ca),
    )
    try:
        rotation = await asyncio.to_thread(TlsRotation, files)
    except CertificateError as error:
        raise ServeError(str(error)) from error
    cleanup.push_async_callback(end, asyncio.create_task(rotation.run()))
    return rotation


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is over."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
