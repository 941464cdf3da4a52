"""Adapter residency on the device: fills slab rows from adapter directories without holding up the step loop."""

import concurrent.futures
import errno
import os
from collections import OrderedDict
from pathlib import Path

import torch

from loramux_base.adapter import AdapterFormatError, read_layout
from loramux_base.shapes import BaseShapes
from loramux_server.errors import FailedPrecondition, LoramuxServerError, Reason, Unavailable
from loramux_server.model.slab import LoraSlab

_MAX_KNOWN_SIZES = 4096


class AdapterLoader:
    """`plan.SlabView` over a `LoraSlab`: one thread that loads, and on CUDA its own stream; one that reads layouts.

    A load writes only rows and a table entry that no running sequence uses, so it needs no lock against the step; the
    scheduler uses the slot only after `poll_loads` reported it. Layouts are read apart, so that an adapter whose
    patterns take long to match holds up neither the step nor the load of another one.

    Args:
        slab: Where adapters live.
        shapes: Widths of the base's linear layers.
        rank_units: Capacity of the slab in units of 16 rank rows.
        max_slots: Most adapters resident at once.
        max_rank: Largest adapter rank taken.
        device: Where the slab is.
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
    ) -> None:
        self._slab = slab
        self._shapes = shapes
        self._rank_units = rank_units
        self._max_slots = max_slots
        self._max_rank = max_rank
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
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
        self._running[slot] = self._thread.submit(self._load, slot, first_unit, units, version_path)

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

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, slot: int, first_unit: int, units: int, version_path: str) -> None:
        try:
            if self._stream is None:
                self._slab.load(slot, first_unit, units, Path(version_path))
                return
            with torch.cuda.stream(self._stream):
                self._slab.load(slot, first_unit, units, Path(version_path))
            self._stream.synchronize()
        except AdapterFormatError as error:
            raise _refusal(error, version_path) from error
        except OSError as error:
            raise _unreadable(error) from error

    def _read_units(self, version_path: str) -> int:
        try:
            return read_layout(Path(version_path), self._shapes, max_rank=self._max_rank).rank_units
        except AdapterFormatError as error:
            raise _refusal(error, version_path) from error
        except OSError as error:
            raise _unreadable(error) from error


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

    def close(self) -> None:
        """Nothing runs."""


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
