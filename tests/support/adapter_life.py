"""The life of adapters over a real registry and store, with an engine that keeps a journal."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from loramux_server.engine.messages import VersionState as VersionStateEvent
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.tenancy.changes import RegistryLimits
from loramux_server.tenancy.idempotency import IdempotencyKey
from loramux_server.tenancy.names import AdapterReference, version_key
from loramux_server.tenancy.records import VersionRecord
from loramux_server.tenancy.registry import Registry
from loramux_server.tenancy.store import LocalStore
from tests.support.lifecycle_doubles import FakeEngine, FakeValidator, digest_of, upload_request

T = "default"
BOT = AdapterReference(tenant=T, adapter="bot")
BOT_NAME = "tenants/default/adapters/bot"


class Life:
    """An `AdapterLifecycle` and what stands around it."""

    def __init__(self, root: Path, limits: RegistryLimits | None = None) -> None:
        self.root = root
        self.engine = FakeEngine()
        self.validator = FakeValidator()
        self.registry = Registry(root / "registry.sqlite", limits=limits)
        self.store = LocalStore(root / "store")
        self.cycle = AdapterLifecycle(
            self.registry, self.store, self.validator, self.engine, heartbeat=0.05, unload_wait=0.05
        )

    async def upload(self, content: str, adapter: str = "bot", **options: Any) -> VersionRecord:
        """Upload a version whose bytes are `content`."""
        data = content.encode()
        upload = await self.cycle.start_upload(T, upload_request(data, adapter))
        if upload.committed_bytes < len(data):
            await self.cycle.write_upload(T, upload.upload_id, 0, data)
        return await self.cycle.finish_upload(T, upload.upload_id, **options)

    async def move(self, *contents: str, adapter: str = "bot", **options: Any) -> Any:
        """Give the versions of these contents equal weights in the traffic."""
        traffic = [(version(content, adapter), 1) for content in contents]
        return await self.cycle.update(T, AdapterReference(tenant=T, adapter=adapter), traffic=traffic, **options)

    def dropped(self, content: str, adapter: str = "bot") -> None:
        """Tell that the engine has let go of a version."""
        key = version_key(T, adapter, digest_of(content))
        self.cycle.on_version_state(VersionStateEvent(version=key, residency="store", references=0, dropped=True))

    def stored(self, content: str) -> bool:
        """Whether the store holds the bytes."""
        return self.store.contains(T, digest_of(content))

    async def settle(self) -> None:
        """Wait until nothing but the sweep is left to do."""
        async with asyncio.timeout(10):
            while pending := [task for task in self.cycle._tasks if "_sweep" not in repr(task.get_coro())]:
                await asyncio.wait(pending)


@asynccontextmanager
async def running(root: Path, limits: RegistryLimits | None = None) -> AsyncIterator[Life]:
    """Start the life of adapters over `root`, check its integrity, close it."""
    life = Life(root, limits)
    await life.cycle.start()
    try:
        yield life
        life.cycle.table.check_integrity()
        await asyncio.to_thread(life.registry.check_integrity)
    finally:
        await life.cycle.close()


def version(content: str, adapter: str = "bot") -> AdapterReference:
    """Reference of a version by its content."""
    return AdapterReference(tenant=T, adapter=adapter, version=digest_of(content))


def key_of(content: str, adapter: str = "bot") -> str:
    """The engine's key of a version by its content."""
    return version_key(T, adapter, digest_of(content))


def idem(method: str = "UpdateAdapter", payload: bytes = b"p") -> IdempotencyKey:
    """An idempotency key of the tenant."""
    return IdempotencyKey(tenant=T, method=method, key="k", payload_hash=payload)
