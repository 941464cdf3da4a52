"""Brings the rows of adapter versions from the store to the host, for loads that wait and ahead of those to come.

    store --(serving blob, or PEFT files)--> host arena --> whoever holds the lease copies it to the device

Loads that wait are read by one thread and hints by another, so that nothing read ahead holds a load up; a version that
both want is read once. After a version was read from its PEFT files, a third thread writes its serving blob.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from loramux_base.adapter import read_layout
from loramux_base.shapes import BaseShapes
from loramux_server.engine.blob_writer import BlobWriter
from loramux_server.engine.host_arena import HostArena, Lease
from loramux_server.model.adapter_read import read_rows
from loramux_server.model.adapter_rows import RowsLayout
from loramux_server.model.serving_blob import BLOB_NAME, BadBlob, ServingBlob, blob_binding

logger = logging.getLogger(__name__)

HINT_SECONDS = 10.0
"""How long a hint keeps its rows in the arena from hints that come later, and from being followed again."""
RETRY_SECONDS = 1.0
"""After so long a hint that found no room may be followed again."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Fetch:
    """A version on its way to the host.

    Attributes:
        path: Its directory.
        ahead: It was hinted, and no load waits for it.
        started: A thread has taken it.
        forgotten: Its rows are for who waits only; the arena does not keep them.
        waiters: Loads that wait.
    """

    path: str
    ahead: bool
    started: bool = False
    forgotten: bool = False
    waiters: list["concurrent.futures.Future[Lease]"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """Rows, and the binding of the blob that is to be written of them."""

    lease: Lease
    binding: str | None


class _NoRoom(Exception):
    """What was hinted finds no room in the arena."""


class AdapterFetcher:
    """See the module.

    Args:
        arena: Where rows are kept.
        base: Shapes of the base's linear layers.
        dtype: Of the rows.
        max_rank: Largest rank taken.
        max_hints: Hints that may be open at once; further ones are dropped.
        blobs: Whether serving blobs are read and written: versions' directories are the server's own then.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        arena: HostArena,
        base: BaseShapes,
        *,
        dtype: torch.dtype,
        max_rank: int,
        max_hints: int,
        blobs: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arena = arena
        self._base = base
        self._dtype = dtype
        self._max_rank = max_rank
        self._max_hints = max_hints
        self._blobs = blobs
        self._clock = clock
        # Held while work is handed to a thread that is being closed, which ends the work at once, in this thread.
        self._lock = threading.RLock()
        self._fetches: dict[str, _Fetch] = {}
        # Hinted versions that no load has taken yet, each with the time at which the hint is void.
        self._hinted: dict[str, float] = {}
        self._demand = _thread("adapter-fetcher")
        self._ahead = _thread("adapter-prefetcher")
        self._writer = BlobWriter()
        self.hits = 0
        """Loads that found their rows on the host."""
        self.misses = 0
        """Loads that waited for the store."""
        self.prefetches = 0
        """Versions that were there before a load asked for them."""

    def fetch(self, path: str) -> "concurrent.futures.Future[Lease]":
        """Get the rows of a version for a load that waits.

        Args:
            path: The PEFT directory.

        Returns:
            A lease, to be released; what reading raised (`AdapterFormatError`, `OSError`); or cancelled by `close`.
        """
        future: concurrent.futures.Future[Lease] = concurrent.futures.Future()
        with self._lock:
            self._hinted.pop(path, None)
            lease = self._arena.lease(path)
            if lease is None:
                self.misses += 1
                fetch = self._fetches.get(path)
                if fetch is None:
                    fetch = self._fetches[path] = _Fetch(path=path, ahead=False)
                    self._submit(self._demand, fetch)
                elif fetch.ahead and not fetch.started:
                    # It stands in the other thread's queue behind what nobody waits for.
                    self._submit(self._demand, fetch)
                fetch.ahead = False
                fetch.waiters.append(future)
                return future
            self.hits += 1
        future.set_result(lease)
        return future

    def prefetch(self, path: str) -> None:
        """Hint that a version will be loaded soon. Never blocks; dropped when too many hints are open."""
        now = self._clock()
        with self._lock:
            until = self._hinted.get(path)
            if until is not None and until > now:
                return
            if path in self._fetches or not self._arena.nbytes:
                return
            self._end_hints()
            if len(self._hinted) >= self._max_hints:
                return
            self._hinted[path] = now + HINT_SECONDS
            if path not in self._arena:
                fetch = self._fetches[path] = _Fetch(path=path, ahead=True)
                self._submit(self._ahead, fetch)

    def forget(self, path: str) -> None:
        """Keep nothing of a version on the host; loads that wait for it still get it."""
        with self._lock:
            self._hinted.pop(path, None)
            fetch = self._fetches.pop(path, None)
            if fetch is not None:
                fetch.forgotten = True
            self._arena.remove(path)

    def wait_idle(self, timeout: float = 60.0) -> None:
        """Wait until everything is read and written; made for tests and benches.

        Raises:
            TimeoutError: It took longer.
        """
        until = time.monotonic() + timeout
        while not self._idle():
            if time.monotonic() > until:
                raise TimeoutError("adapters are still being read or written")
            time.sleep(0.001)

    def close(self) -> None:
        """Wait for what runs and end the threads; loads that still wait are cancelled."""
        for thread in (self._ahead, self._demand):
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in (self._ahead, self._demand):
            thread.shutdown()
        self._writer.close()

    def _idle(self) -> bool:
        # What was read is handed to the writer under the lock.
        with self._lock:
            return not self._fetches and not self._writer.unwritten

    # --- threads ---------------------------------------------------------------------------------------------------

    def _submit(self, thread: concurrent.futures.ThreadPoolExecutor, fetch: _Fetch) -> None:
        thread.submit(self._run, fetch).add_done_callback(functools.partial(self._finish, fetch))

    def _run(self, fetch: _Fetch) -> "_Read | None":
        """Read; None when another thread does it, or when nobody waits and there is no room."""
        with self._lock:
            if fetch.started:
                return None
            fetch.started = True
        while True:
            with self._lock:
                ahead = not fetch.waiters
                if ahead and fetch.forgotten:
                    return None
            try:
                return self._read(fetch.path, ahead=ahead)
            except _NoRoom:
                with self._lock:
                    if fetch.waiters:
                        # A load came meanwhile: it gets memory of its own if need be.
                        continue
                    self._drop(fetch)
                    if fetch.path in self._hinted:
                        self._hinted[fetch.path] = self._clock() + RETRY_SECONDS
                    return None

    def _read(self, path: str, *, ahead: bool) -> "_Read":
        directory = Path(path)
        binding = self._binding(directory)
        if binding is not None:
            lease = self._read_blob(directory, binding, ahead=ahead)
            if lease is not None:
                return _Read(lease, None)
        adapter = read_layout(directory, self._base, max_rank=self._max_rank)
        layout = RowsLayout.of(self._base, adapter, dtype=self._dtype)
        room = self._room(path, layout.nbytes, ahead=ahead)
        try:
            read_rows(directory, adapter, layout, room.memory)
        except BaseException:
            room.release()
            raise
        room.fill(layout)
        return _Read(room, binding)

    def _binding(self, directory: Path) -> str | None:
        if not self._blobs:
            return None
        try:
            return blob_binding(directory, self._base, self._dtype)
        except OSError:
            # Reading the adapter itself says what is wrong.
            return None

    def _read_blob(self, directory: Path, binding: str, *, ahead: bool) -> Lease | None:
        """Rows from the blob; None without one that can be used."""
        try:
            with ServingBlob(
                directory, binding=binding, base=self._base, dtype=self._dtype, max_rank=self._max_rank
            ) as blob:
                room = self._room(str(directory), blob.layout.nbytes, ahead=ahead)
                try:
                    blob.read(room.memory)
                except BaseException:
                    room.release()
                    raise
        except FileNotFoundError:
            return None
        except (BadBlob, OSError) as error:
            self._writer.complain(directory, f"{BLOB_NAME} is not used: {error}")
            return None
        room.fill(blob.layout)
        return room

    def _room(self, path: str, nbytes: int, *, ahead: bool) -> Lease:
        with self._lock:
            self._end_hints()
            room = self._arena.reserve(path, nbytes, spare=self._hinted, keep_spared=ahead)
        if room is not None:
            return room
        if ahead:
            raise _NoRoom
        return Lease(torch.empty(nbytes, dtype=torch.uint8))

    def _end_hints(self) -> None:
        now = self._clock()
        for path in [path for path, until in self._hinted.items() if until <= now]:
            del self._hinted[path]

    def _finish(self, fetch: _Fetch, done: "concurrent.futures.Future[_Read | None]") -> None:
        if done.cancelled():
            with self._lock:
                if fetch.started:
                    return
                fetch.started = True
                self._drop(fetch)
            for waiter in fetch.waiters:
                waiter.cancel()
            return
        error = done.exception()
        if error is not None:
            with self._lock:
                self._drop(fetch)
            if not fetch.waiters:
                logger.info("an adapter could not be read ahead of its load", exc_info=error)
            for waiter in fetch.waiters:
                waiter.set_exception(error)
            return
        found = done.result()
        if found is None:
            return
        with self._lock:
            self._drop(fetch)
            if not fetch.forgotten:
                found.lease.publish()
            self.prefetches += not fetch.waiters
            shares = [found.lease.share() for _ in fetch.waiters]
            if found.binding is not None and not fetch.forgotten:
                self._writer.write(Path(fetch.path), found.lease.share(), found.binding)
        for waiter, share in zip(fetch.waiters, shares, strict=True):
            waiter.set_result(share)
        found.lease.release()

    def _drop(self, fetch: _Fetch) -> None:
        if self._fetches.get(fetch.path) is fetch:
            del self._fetches[fetch.path]


def _thread(name: str) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
