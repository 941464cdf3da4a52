"""Adapter residency on the device: fills slab rows from the host without holding up the step loop."""

import concurrent.futures
import dataclasses
import errno
import functools
import os
from collections import OrderedDict
from pathlib import Path

import torch

from loramux_base.adapter import AdapterFormatError, read_layout
from loramux_base.shapes import BaseShapes
from loramux_server.engine.adapter_fetcher import AdapterFetcher
from loramux_server.engine.host_arena import HostArena, Lease
from loramux_server.engine.plan import HostUse
from loramux_server.errors import FailedPrecondition, LoramuxServerError, Reason, Unavailable
from loramux_server.model.slab import UNIT_ROWS, LoraSlab

_MAX_KNOWN_SIZES = 4096


class AdapterLoader:
    """`plan.SlabView` over a `LoraSlab`: reads layouts, has rows fetched to the host, copies them to the device.

    Each of these has threads of its own, so that an adapter whose patterns take long to match, one that is read from a
    slow store and one that is only hinted hold up neither the step nor the load of another one. A copy writes only rows
    and a table entry that no running sequence uses, so it needs no lock against the step; the scheduler uses the slot
    only after `poll_loads` reported it. On CUDA copies have a stream of their own.

    Args:
        slab: Where adapters live.
        shapes: Widths of the base's linear layers.
        rank_units: Capacity of the slab in units of 16 rank rows.
        max_slots: Most adapters resident at once.
        max_rank: Largest adapter rank taken.
        device: Where the slab is.
        host_bytes: Host memory that keeps adapters' rows; 0 = none.
        serving_blobs: Whether serving blobs may be written into the versions' directories, and are read from there.
    """

    def __init__(
        self,
        slab: LoraSlab,
        shapes: BaseShapes,
        *,
        rank_units: int,
        max_slots: int,
        max_rank: int,
        device: torch.device,
        host_bytes: int = 0,
        serving_blobs: bool = False,
    ) -> None:
        self._slab = slab
        self._shapes = shapes
        self._rank_units = rank_units
        self._max_slots = max_slots
        self._max_rank = max_rank
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arena = HostArena(host_bytes, device=device)
        self._fetcher = AdapterFetcher(
            self._arena,
            shapes,
            dtype=slab.dtype,
            max_rank=max_rank,
            max_hints=2 * max_slots,
            blobs=serving_blobs,
        )
        self._copier = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-copier")
        self._running: dict[int, concurrent.futures.Future[None]] = {}
        self._reader = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-reader")
        # Versions are immutable, so a size never goes stale; the bound keeps memory flat under churn.
        self._sizes: OrderedDict[str, concurrent.futures.Future[int]] = OrderedDict()

    @property
    def rank_units(self) -> int:
        """Capacity in units of 16 rank rows."""
        return self._rank_units

    @property
    def max_slots(self) -> int:
        """Most adapters resident at once."""
        return self._max_slots

    def units_of(self, version_path: str) -> int | None:
        """Rank units a version needs; None while its layout is being read.

        Raises:
            LoramuxServerError: ADAPTER_INCOMPATIBLE or STORE_UNAVAILABLE.
        """
        size = self._sizes.get(version_path)
        if size is None:
            rows = self._arena.rank_rows(version_path)
            if rows is not None:
                return -(-rows // UNIT_ROWS)
            self._sizes[version_path] = self._reader.submit(self._read_units, version_path)
            if len(self._sizes) > _MAX_KNOWN_SIZES:
                self._sizes.popitem(last=False)[1].cancel()
            return None
        if not size.done():
            return None
        self._sizes.move_to_end(version_path)
        if size.exception() is not None:
            # The store may be back the next time.
            del self._sizes[version_path]
        return size.result()

    def start_load(self, slot: int, first_unit: int, units: int, version_path: str) -> None:
        """Begin to fill a slot; `poll_loads` says when it is there."""
        assert slot not in self._running, f"slot {slot} is being loaded"
        outcome = self._running[slot] = concurrent.futures.Future()
        load = _Load(slot=slot, first_unit=first_unit, units=units, version_path=version_path, outcome=outcome)
        self._fetcher.fetch(version_path).add_done_callback(functools.partial(self._copy_later, load))

    def poll_loads(self) -> list[tuple[int, Exception | None]]:
        """Loads that ended since the last call, with their error."""
        ended: list[tuple[int, Exception | None]] = []
        for slot, future in list(self._running.items()):
            if future.done():
                del self._running[slot]
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                ended.append((slot, error))
        return ended

    def clear(self, slot: int) -> None:
        """Forget a slot."""
        assert slot not in self._running, f"slot {slot} is being loaded"
        self._slab.clear(slot)

    def prefetch(self, version_path: str) -> None:
        """Hint that a version will be loaded soon: its rows begin to move to the host."""
        self._fetcher.prefetch(version_path)

    def forget(self, version_path: str) -> None:
        """Keep nothing of a version on the host."""
        self._sizes.pop(version_path, None)
        self._fetcher.forget(version_path)

    def in_host(self, version_path: str) -> bool:
        """Whether a version's rows are in host memory."""
        return version_path in self._arena

    def poll_host(self) -> list[str]:
        """Versions whose `in_host` may have changed since the last call."""
        return self._arena.take_changes()

    def host_use(self) -> HostUse:
        """Gauges and counters of host memory."""
        return HostUse(
            bytes_used=self._arena.used,
            bytes_total=self._arena.nbytes,
            hits=self._fetcher.hits,
            misses=self._fetcher.misses,
            prefetches=self._fetcher.prefetches,
        )

    def wait_idle(self) -> None:
        """Wait until everything that was asked for is read, copied and written; made for tests and benches.

        Raises:
            TimeoutError: It took longer than a minute.
        """
        self._fetcher.wait_idle()
        concurrent.futures.wait(list(self._running.values()))

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._fetcher.close()
        self._copier.shutdown(wait=True, cancel_futures=True)
        self._arena.close()

    def check_integrity(self) -> None:
        """Assert the invariants of arena and slab; made for tests."""
        self._arena.check_integrity()
        self._slab.check_integrity()

    def _copy_later(self, load: "_Load", fetched: "concurrent.futures.Future[Lease]") -> None:
        """Go on with a load whose rows are on the host, in the thread that brought them."""
        if fetched.cancelled():
            load.outcome.cancel()
            return
        error = fetched.exception()
        if error is not None:
            load.outcome.set_exception(_told(error, load.version_path))
            return
        copying = self._copier.submit(self._copy, load, fetched.result())
        copying.add_done_callback(functools.partial(_end, load))

    def _copy(self, load: "_Load", lease: Lease) -> None:
        try:
            if self._stream is None:
                self._slab.fill(load.slot, load.first_unit, load.units, lease.rows)
                return
            try:
                with torch.cuda.stream(self._stream):
                    self._slab.fill(load.slot, load.first_unit, load.units, lease.rows)
            finally:
                # Whatever was put on the stream reads the leased memory.
                self._stream.synchronize()
        finally:
            lease.release()

    def _read_units(self, version_path: str) -> int:
        try:
            return read_layout(Path(version_path), self._shapes, max_rank=self._max_rank).rank_units
        except (AdapterFormatError, OSError) as error:
            raise _told(error, version_path) from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    slot: int
    first_unit: int
    units: int
    version_path: str
    outcome: "concurrent.futures.Future[None]"


class NoAdapters:
    """`plan.SlabView` of a base that takes no adapters: every version is refused with the reason.

    Args:
        why: Why not, for the caller.
    """

    rank_units = 0
    max_slots = 0

    def __init__(self, why: str) -> None:
        self._why = why

    def units_of(self, version_path: str) -> int:
        """Never fits.

        Raises:
            FailedPrecondition: ADAPTER_INCOMPATIBLE, always.
        """
        raise FailedPrecondition(Reason.ADAPTER_INCOMPATIBLE, self._why)

    def start_load(self, slot: int, first_unit: int, units: int, version_path: str) -> None:
        """Never called: `units_of` refuses before."""
        raise AssertionError("a base without adapters has no slots")

    def poll_loads(self) -> list[tuple[int, Exception | None]]:
        """Nothing loads."""
        return []

    def clear(self, slot: int) -> None:
        """Never called."""
        raise AssertionError("a base without adapters has no slots")

    def prefetch(self, version_path: str) -> None:
        """Nothing is read."""

    def forget(self, version_path: str) -> None:
        """Nothing is kept."""

    def in_host(self, version_path: str) -> bool:
        """Never."""
        return False

    def poll_host(self) -> list[str]:
        """Nothing changes."""
        return []

    def host_use(self) -> HostUse:
        """None."""
        return HostUse()

    def wait_idle(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing runs."""


def _end(load: _Load, copying: "concurrent.futures.Future[None]") -> None:
    if copying.cancelled():
        load.outcome.cancel()
        return
    error = copying.exception()
    if error is None:
        load.outcome.set_result(None)
    else:
        load.outcome.set_exception(_told(error, load.version_path))


def _told(error: BaseException, version_path: str) -> BaseException:
    """The error as callers are told it; what is no fault of the adapter or the store stays as it is."""
    if isinstance(error, AdapterFormatError):
        told: LoramuxServerError = _refusal(error, version_path)
    elif isinstance(error, OSError):
        told = _unreadable(error)
    else:
        return error
    told.__cause__ = error
    return told


def _refusal(error: AdapterFormatError, version_path: str) -> LoramuxServerError:
    if not Path(version_path).is_dir():
        # It was validated once, so it is the store that is away, not the adapter that is wrong.
        return _unreadable(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    return FailedPrecondition(Reason(error.reason), error.message, field=error.field)


def _unreadable(error: OSError) -> LoramuxServerError:
    # strerror only: the message goes to the caller and must not name a path.
    return Unavailable(
        Reason.STORE_UNAVAILABLE,
        f"the adapter's files cannot be read now ({error.strerror}); retry, and check the store if it persists",
        retry_after=1.0,
    )
