"""Follows the operator's directory of adapters by looking at it again and again; see `directory_publisher`.

An entry is taken once it has not changed for a poll, and again when it changes. What cannot be taken is said once and
keeps nothing else from being taken; what goes away is said once and deletes nothing.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from loramux_server.errors import AccessDenied, FailedPrecondition, Internal, InvalidRequest, LoramuxServerError
from loramux_server.lora.adapter_directory import PARTIAL, AdapterDirectory, AdapterEntry, EntryChanged, LeftAlone, Scan
from loramux_server.lora.directory_publisher import DirectoryPublisher
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.taken_content import TakenContent
from loramux_server.tenancy.names import echo

_log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 120.0
_LONGEST_DELAY = 60.0
_MODIFIED = "has just been modified; it is taken when it no longer changes"
# The same bytes would meet the same end; a directory that kills the validating process does so again.
_FOR_GOOD = (InvalidRequest, FailedPrecondition, Internal)


@dataclass(slots=True, kw_only=True)
class _Known:
    """An entry as it was last seen; `decided` until it changes, otherwise not looked at before `retry_at`."""

    entry: AdapterEntry
    decided: bool = False
    retry_at: float = 0.0
    delay: float = 0.0
    said: str = ""


class DirectorySource:
    """See the module. Call `begin` once adapters can be validated, and `close` before the lifecycle's.

    Args:
        root: The operator's directory.
        lifecycle: Takes the adapters; not owned.
        state: File in the store that remembers what was taken.
        on_first_scan: Awaited once, when every adapter of the first scan is served or was said not to be.
        poll: Seconds between looks.
        patience: Most seconds that `on_first_scan` is put off.
        clock: Unix seconds.
    """

    def __init__(
        self,
        root: Path,
        lifecycle: AdapterLifecycle,
        state: Path,
        *,
        on_first_scan: Callable[[], Awaitable[None]],
        poll: float = POLL_SECONDS,
        patience: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = AdapterDirectory(root)
        self._lifecycle = lifecycle
        self._state = state
        self._on_first_scan = on_first_scan
        self._poll = poll
        self._patience = patience
        self._clock = clock
        self._publisher: DirectoryPublisher
        self._known: dict[tuple[str, str], _Known] = {}
        self._left: dict[str, str] = {}
        self._following: asyncio.Task[None] | None = None
        self.first_scan_over = False

    async def open(self) -> None:
        """Read what was taken before, and see whether the directory can be read.

        Raises:
            OSError: It cannot.
        """
        await asyncio.to_thread(self._directory.scan)
        taken = await asyncio.to_thread(TakenContent, self._state)
        self._publisher = DirectoryPublisher(self._directory, self._lifecycle, taken)

    def begin(self) -> None:
        """Follow the directory from now on; a second call does nothing."""
        if self._following is None:
            self._following = asyncio.create_task(self._follow())
            self._following.add_done_callback(_log_bug)

    async def close(self) -> None:
        """Stop, in the middle of whatever is under way. Idempotent."""
        if self._following is not None:
            self._publisher.stop()
            self._following.cancel()
            await asyncio.wait([self._following])

    # --- internals -------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        first = asyncio.create_task(self._first_scan())
        try:
            done, _ = await asyncio.wait([first], timeout=self._patience)
            if not done:
                _log.warning(
                    "adapters directory: the first scan takes longer than %g s; the server is ready without the "
                    "adapters that are not taken yet",
                    self._patience,
                )
            self.first_scan_over = True
            await self._on_first_scan()
            await first
        finally:
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
        while True:
            await asyncio.sleep(self._poll)
            await self._scan()

    async def _first_scan(self) -> None:
        await self._scan()
        if any(not known.decided and not known.delay for known in self._known.values()):
            # Put there a moment ago, perhaps for this very start; what still changes after that has to wait.
            await asyncio.sleep(self._poll)
            await self._scan()

    async def _scan(self) -> None:
        try:
            scan = await asyncio.to_thread(self._directory.scan)
        except OSError as error:
            self._say_left([LeftAlone(tenant="", adapter=None, reason=f"it cannot be read ({error.strerror})")])
            return
        foreign = self._foreign(scan)
        entries = [entry for entry in scan.entries if entry.tenant not in foreign]
        left = [item for item in scan.left if item.tenant not in foreign or item.adapter is None]
        for tenant in sorted(foreign):
            left.append(LeftAlone(tenant=tenant, adapter=None, reason="this server has no such tenant"))
        self._say_left(left)
        self._forget_gone(entries, left)
        for entry in entries:
            await self._look(entry)

    def _foreign(self, scan: Scan) -> set[str]:
        """Tenants in the directory that are not served here."""
        found = set()
        inside = [item for item in scan.left if item.adapter is not None]
        for tenant in {entry.tenant for entry in scan.entries} | {item.tenant for item in inside}:
            try:
                self._lifecycle.table.tenant(tenant)
            except AccessDenied:
                found.add(tenant)
        return found

    async def _look(self, entry: AdapterEntry) -> None:
        key = (entry.tenant, entry.adapter)
        known = self._known.get(key)
        if known is None or known.entry != entry:
            said = _MODIFIED if known is not None and known.said == _MODIFIED else ""
            known = self._known[key] = _Known(entry=entry, said=said)
            if self._clock() - entry.newest < self._poll:
                self._say(known, logging.INFO, _MODIFIED)
                return
        elif known.decided or time.monotonic() < known.retry_at:
            return
        try:
            outcome = await self._publisher.publish(entry)
        except EntryChanged:
            # Seen by the next scan, unless all that has happened is that the server stops.
            return
        except _FOR_GOOD as error:
            known.decided = True
            self._say(known, logging.WARNING, f"is refused until it changes: {error.reason}: {error}")
        except (LoramuxServerError, OSError) as error:
            why = f"{error.reason}: {error}" if isinstance(error, LoramuxServerError) else error.strerror
            known.delay = min(_LONGEST_DELAY, max(self._poll, 2 * known.delay))
            known.retry_at = time.monotonic() + known.delay
            self._say(known, logging.WARNING, f"cannot be taken now, which is tried again: {why}")
        else:
            known.decided = True
            self._say(known, logging.INFO, outcome)

    def _forget_gone(self, entries: list[AdapterEntry], left: list[LeftAlone]) -> None:
        there = {(entry.tenant, entry.adapter) for entry in entries}
        unclear = {item.path for item in left}
        for key in sorted(self._known.keys() - there):
            if unclear.isdisjoint(("", key[0], "/".join(key))):
                del self._known[key]
                _log.warning(
                    "adapters directory: %s is gone; nothing is deleted, the adapter goes on as it is", "/".join(key)
                )

    def _say(self, known: _Known, level: int, what: str) -> None:
        if known.said != what:
            known.said = what
            _log.log(level, "adapters directory: %s %s", known.entry.path, what)

    def _say_left(self, left: list[LeftAlone]) -> None:
        now = {item.path: item.reason for item in left}
        for path, reason in now.items():
            if self._left.get(path) != reason:
                name = path.rpartition("/")[2]
                # On their way in or out, most likely.
                level = logging.INFO if name.startswith(".") or name.endswith(PARTIAL) else logging.WARNING
                shown = echo(path) if path else "all of it"
                _log.log(level, "adapters directory: %s is left alone: %s", shown, reason)
        if "" in self._left and "" not in now:
            _log.info("adapters directory: all of it is looked at again")
        self._left = now


def _log_bug(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.error("following the adapters directory broke", exc_info=task.exception())
