"""Watches on a tenant's adapters: a snapshot, then the latest state of whatever changed, in order of revision.

A watch remembers which adapters changed, not how often: a slow reader finds one entry an adapter, however many changes
it missed. So a watch is bounded by the number of adapters.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from loramux_server.errors import Reason, ResourceExhausted
from loramux_server.tenancy.records import AdapterState

HEARTBEAT_SECONDS = 30.0
MOST_WATCHES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotEntry:
    """One adapter as it was when the watch began."""

    revision: int
    state: AdapterState


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotEnd:
    """The snapshot is complete: so many adapters."""

    revision: int
    adapters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """The latest state of an adapter that was created, changed or moved between residency levels."""

    revision: int
    state: AdapterState


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """An adapter that the watch has shown is gone; `adapter` is its {a}."""

    revision: int
    adapter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Nothing happened for a while."""

    revision: int


WatchEvent = SnapshotEntry | SnapshotEnd | Changed | Deleted | Beat


class _Watch:
    def __init__(self, tenant: str, prefix: str) -> None:
        self.tenant = tenant
        self.prefix = prefix
        self.dirty: dict[str, int] = {}
        self.wake = asyncio.Event()


class WatchHub:
    """Every watch of this process; used on the event loop only.

    Args:
        states: The current adapters by (tenant, {a}).
        revision: The registry revision that `states` shows.
        heartbeat: Seconds without an event before a `Beat`.
        most: Most watches of a tenant.
    """

    def __init__(
        self,
        states: Callable[[], Mapping[tuple[str, str], AdapterState]],
        revision: Callable[[], int],
        *,
        heartbeat: float = HEARTBEAT_SECONDS,
        most: int = MOST_WATCHES,
    ) -> None:
        self._states = states
        self._revision = revision
        self._heartbeat = heartbeat
        self._most = most
        self._watches: set[_Watch] = set()

    @property
    def watches(self) -> int:
        """Watches that are open."""
        return len(self._watches)

    def publish(self, tenant: str, adapter: str, revision: int) -> None:
        """Tell the watches that an adapter changed.

        Args:
            tenant: Owner.
            adapter: {a}.
            revision: Registry revision of the change; for a change of residency the adapter's own.
        """
        for watch in self._watches:
            if watch.tenant == tenant and adapter.startswith(watch.prefix):
                watch.dirty[adapter] = revision
                watch.wake.set()

    async def watch(self, tenant: str, prefix: str) -> AsyncGenerator[WatchEvent, None]:
        """Watch a tenant's adapters whose {a} starts with `prefix`, until the iterator is closed.

        Raises:
            ResourceExhausted: TENANT_QUOTA.
        """
        held = sum(1 for watch in self._watches if watch.tenant == tenant)
        if held >= self._most:
            raise ResourceExhausted(
                Reason.TENANT_QUOTA,
                f"the tenant has {held} watches, the limit is {self._most}; close one first",
                metadata={"quota": "watches", "limit": str(self._most)},
                retry_after=5.0,
            )
        watch = _Watch(tenant, prefix)
        self._watches.add(watch)
        try:
            async with aclosing(self._events(watch)) as events:
                async for event in events:
                    yield event
        finally:
            self._watches.discard(watch)

    async def _events(self, watch: _Watch) -> AsyncGenerator[WatchEvent, None]:
        first = sorted(
            (
                state
                for (tenant, adapter), state in self._states().items()
                if tenant == watch.tenant and adapter.startswith(watch.prefix)
            ),
            key=lambda state: state.adapter.revision,
        )
        last = self._revision()
        for state in first:
            yield SnapshotEntry(revision=state.adapter.revision, state=state)
        yield SnapshotEnd(revision=last, adapters=len(first))
        shown = {state.adapter.adapter for state in first}
        while True:
            if not watch.dirty:
                watch.wake.clear()
                try:
                    async with asyncio.timeout(self._heartbeat):
                        await watch.wake.wait()
                except TimeoutError:
                    yield Beat(revision=last)
                continue
            adapter = min(watch.dirty, key=watch.dirty.__getitem__)
            last = max(last, watch.dirty.pop(adapter))
            current = self._states().get((watch.tenant, adapter))
            if current is not None:
                shown.add(adapter)
                yield Changed(revision=last, state=current)
            elif adapter in shown:
                shown.discard(adapter)
                yield Deleted(revision=last, adapter=adapter)
