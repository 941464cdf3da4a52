"""The host arena: one piece of memory that keeps adapters' rows between store and slab, least recently used out first.

On CUDA the piece is page-locked, so that copies to the device run at full speed beside the steps. Rows of a version lie
in one run of bytes; who reads or fills them holds a `Lease`, and leased rows stay where they are. Every method may be
called from any thread.
"""

import bisect
import contextlib
import dataclasses
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Container, Iterable

import torch
from torch import Tensor

from loramux_server.model.adapter_rows import AdapterRows, RowsLayout

logger = logging.getLogger(__name__)

# Of every entry, so that any dtype can be laid over it and copies begin at a cache line.
_ALIGNMENT = 64


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    key: str
    start: int
    nbytes: int
    pins: int = 1
    rows: AdapterRows | None = None
    listed: bool = False

    @property
    def size(self) -> int:
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT

    @property
    def end(self) -> int:
        return self.start + self.size


class Lease:
    """Host memory that stays as it is until `release`.

    Args:
        memory: `[bytes]` uint8.
        arena: Whose it is; None = memory of its own, given back when nobody holds it any more.
        entry: Its place in the arena.
    """

    def __init__(self, memory: Tensor, arena: "HostArena | None" = None, entry: _Entry | None = None) -> None:
        self.memory = memory
        self.arena = arena
        self._entry = entry
        self._rows = entry.rows if entry is not None else None
        self._released = False

    @property
    def rows(self) -> AdapterRows:
        """The adapter in it."""
        assert self._rows is not None, "nothing was put into this memory yet"
        return self._rows

    def fill(self, layout: RowsLayout) -> None:
        """Say what is in the memory now, once every byte is there."""
        self._rows = AdapterRows(layout=layout, memory=self.memory[: layout.nbytes])

    def share(self) -> "Lease":
        """Another lease of the same memory, to be released by itself."""
        assert not self._released, "a released lease is shared"
        lease = Lease(self.memory, self.arena, self._entry)
        lease._rows = self._rows
        if self.arena is not None and self._entry is not None:
            self.arena.pin(self._entry)
        return lease

    def publish(self) -> None:
        """Let others find the rows in the arena; memory of its own is found by nobody."""
        if self.arena is not None and self._entry is not None:
            self.arena.publish(self._entry, self.rows)

    def release(self) -> None:
        """Give it back. Idempotent."""
        if self._released:
            return
        self._released = True
        if self.arena is not None and self._entry is not None:
            self.arena.unpin(self._entry)


class HostArena:
    """See the module.

    Args:
        nbytes: Bytes to hold; 0 = it keeps nothing.
        device: Where rows are copied from here; on CUDA the memory is page-locked.
    """

    def __init__(self, nbytes: int, *, device: torch.device) -> None:
        self.nbytes = nbytes // _ALIGNMENT * _ALIGNMENT
        self._memory = torch.empty(self.nbytes, dtype=torch.uint8)
        self._unlock = _page_lock(self._memory) if device.type == "cuda" and self.nbytes else None
        self._lock = threading.Lock()
        # What lies in the memory, by address; what can be found, least recently used first.
        self._placed: list[_Entry] = []
        self._listed: OrderedDict[str, _Entry] = OrderedDict()
        self._changed: dict[str, None] = {}

    @property
    def page_locked(self) -> bool:
        """Whether the memory is page-locked."""
        return self._unlock is not None

    @property
    def used(self) -> int:
        """Bytes taken, leased ones included."""
        with self._lock:
            return sum(entry.size for entry in self._placed)

    def __contains__(self, key: str) -> bool:
        """Whether rows can be found under a key."""
        with self._lock:
            return key in self._listed

    def rank_rows(self, key: str) -> int | None:
        """Rank rows of the adapter under a key; None without one."""
        with self._lock:
            entry = self._listed.get(key)
            return None if entry is None or entry.rows is None else entry.rows.layout.rows

    def lease(self, key: str) -> Lease | None:
        """Use the rows under a key; None when they are not there."""
        with self._lock:
            entry = self._listed.get(key)
            if entry is None:
                return None
            self._listed.move_to_end(key)
            entry.pins += 1
            return Lease(self._slice(entry), self, entry)

    def reserve(self, key: str, nbytes: int, *, spare: Container[str] = (), keep_spared: bool = False) -> Lease | None:
        """Make room for the rows of a version; of the neighbours that could, those used longest ago leave.

        Args:
            key: What they are to be found under once published.
            nbytes: Bytes.
            spare: Keys that leave only when nothing else does.
            keep_spared: They do not leave at all.

        Returns:
            Memory to be filled, then published; None if there is no room beside what is leased or kept.
        """
        assert nbytes > 0
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            start = self._make_room(size, spare, keep_spared=keep_spared)
            if start is None:
                return None
            entry = _Entry(key=key, start=start, nbytes=nbytes)
            bisect.insort(self._placed, entry, key=lambda placed: placed.start)
            return Lease(self._slice(entry), self, entry)

    def remove(self, key: str) -> None:
        """Forget a key; its memory is free when nobody leases it."""
        with self._lock:
            entry = self._listed.get(key)
            if entry is not None:
                self._unlist(entry)

    def take_changes(self) -> list[str]:
        """Keys under which rows came or went since the last call, in order."""
        with self._lock:
            changed, self._changed = list(self._changed), {}
            return changed

    def close(self) -> None:
        """Give the page lock back; nothing may be copied from here any more."""
        if self._unlock is not None:
            self._unlock()

    # --- for leases ------------------------------------------------------------------------------------------------

    def pin(self, entry: _Entry) -> None:
        """Hold an entry that is held already once more."""
        with self._lock:
            assert entry.pins > 0
            entry.pins += 1

    def unpin(self, entry: _Entry) -> None:
        """Hold an entry once less; unpublished ones are free with the last."""
        with self._lock:
            assert entry.pins > 0, f"{entry.key} is not leased"
            entry.pins -= 1
            if not entry.pins and not entry.listed:
                self._placed.remove(entry)

    def publish(self, entry: _Entry, rows: AdapterRows) -> None:
        """Let others find an entry; what was found under its key before is forgotten."""
        with self._lock:
            assert entry.pins > 0 and not entry.listed
            former = self._listed.get(entry.key)
            if former is not None:
                self._unlist(former)
            entry.rows, entry.listed = rows, True
            self._listed[entry.key] = entry
            self._changed[entry.key] = None

    def _slice(self, entry: _Entry) -> Tensor:
        return self._memory[entry.start : entry.start + entry.nbytes]

    def _make_room(self, size: int, spare: Container[str], *, keep_spared: bool) -> int | None:
        """Where a hole of a size is, after as few as possible of the least recently used have left; None = nowhere."""
        start = _first_hole(self._placed, size, self.nbytes)
        if start is not None:
            return start
        free = [e for e in self._listed.values() if not e.pins and not (keep_spared and e.key in spare)]
        free.sort(key=lambda entry: entry.key in spare)
        turns = {id(entry): turn for turn, entry in enumerate(free)}

        def hole(gone: int) -> int | None:
            """The hole there is when so many have left."""
            stays = (entry for entry in self._placed if turns.get(id(entry), gone) >= gone)
            return _first_hole(stays, size, self.nbytes)

        needed = bisect.bisect_left(range(len(free) + 1), True, key=lambda gone: hole(gone) is not None)
        start = hole(needed)
        if start is not None:
            # Those that are not in the way stay: a wide adapter would else empty the arena until a hole happens to fit.
            for entry in free[:needed]:
                if entry.start < start + size and start < entry.end:
                    self._unlist(entry)
        return start

    def _unlist(self, entry: _Entry) -> None:
        del self._listed[entry.key]
        entry.listed = False
        self._changed[entry.key] = None
        if not entry.pins:
            self._placed.remove(entry)

    def check_integrity(self) -> None:
        """Assert that entries do not overlap and that each is leased or can be found; made for tests."""
        with self._lock:
            end = 0
            for entry in self._placed:
                assert entry.start >= end and entry.size > 0, f"{entry.key} overlaps its neighbour"
                assert entry.start % _ALIGNMENT == 0 and entry.size % _ALIGNMENT == 0
                assert entry.pins > 0 or entry.listed, f"{entry.key} belongs to nobody"
                assert entry.listed == (self._listed.get(entry.key) is entry)
                end = entry.end
            assert end <= self.nbytes, "entries leave the arena"
            placed = {id(entry) for entry in self._placed}
            for key, entry in self._listed.items():
                assert entry.key == key and id(entry) in placed and entry.rows is not None


def arena_bytes(asked: int | None, *, cuda: bool) -> int:
    """Bytes of the arena.

    Args:
        asked: The setting; None = 2 GiB for a CUDA device and 256 MiB for a CPU.
        cuda: Whether rows go to a CUDA device.

    Returns:
        At most a quarter of this machine's memory, unless asked for: then at most half of it.
    """
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        physical = 8 << 30
    if asked is None:
        return min((2 << 30) if cuda else (256 << 20), physical // 4)
    return min(asked, physical // 2)


def _first_hole(entries: Iterable[_Entry], size: int, capacity: int) -> int | None:
    """Where the first hole of a size is between entries in the order of their addresses; None without one."""
    start = 0
    for entry in entries:
        if entry.start - start >= size:
            return start
        start = entry.end
    return start if capacity - start >= size else None


def _page_lock(memory: Tensor) -> "weakref.finalize[[int], Tensor] | None":
    """Page-lock memory for as long as it lives; returns what ends that before, or None if the driver refuses.

    torch's own pinned memory would be rounded up to a power of two.
    """
    began = time.monotonic()
    result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if result != 0:
        logger.warning(
            "%d MiB of host memory could not be page-locked (CUDA error %d); adapters load slower",
            memory.nbytes >> 20,
            result,
        )
        # The error stays noted until somebody asks for it, which must not be the next step.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        return None
    logger.info("page-locked %d MiB of host memory in %.2f s", memory.nbytes >> 20, time.monotonic() - began)
    unlock = weakref.finalize(memory, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
    # At exit the driver may be gone, and gives everything back anyway.
    unlock.atexit = False
    return unlock
