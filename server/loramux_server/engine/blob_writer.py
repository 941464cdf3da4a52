"""Writes serving blobs behind the loads that read the adapters, in a thread that yields to all others."""

import concurrent.futures
import contextlib
import functools
import logging
import os
import sys
import threading
from pathlib import Path

from loramux_server.engine.host_arena import Lease
from loramux_server.model.serving_blob import BLOB_NAME, write_blob

logger = logging.getLogger(__name__)

MAX_UNWRITTEN = 4
"""Blobs that may wait: their rows stay in host memory meanwhile."""
_MAX_COMPLAINTS = 1024


class BlobWriter:
    """See the module. A blob that cannot be written is no error: the next load reads the adapter's own files."""

    def __init__(self) -> None:
        """Start with nothing to write."""
        self._thread = concurrent.futures.ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="adapter-blob-writer", initializer=_yield_to_others
        )
        self._lock = threading.Lock()
        self._unwritten = 0
        self._complaints: set[str] = set()

    @property
    def unwritten(self) -> int:
        """Blobs that are being written or wait."""
        return self._unwritten

    def write(self, directory: Path, lease: Lease, binding: str) -> None:
        """Write a blob soon; dropped when too many wait, since the next read from the PEFT files comes back to it.

        Args:
            directory: Of the version.
            lease: Its rows; released when they are written.
            binding: As `blob_binding` gave it before they were read.
        """
        with self._lock:
            full = self._unwritten >= MAX_UNWRITTEN
            self._unwritten += not full
        if full:
            lease.release()
            return
        self._thread.submit(self._write, directory, lease, binding).add_done_callback(
            functools.partial(self._written, lease)
        )

    def complain(self, directory: Path, text: str) -> None:
        """Log what is wrong with a blob, once a version."""
        key = f"{directory}: {text}"
        level = logging.DEBUG if key in self._complaints else logging.WARNING
        if len(self._complaints) >= _MAX_COMPLAINTS:
            # Some are told again; memory stays flat, and what comes now is not told at every load.
            self._complaints.clear()
        self._complaints.add(key)
        logger.log(level, "adapter %s: %s", directory.name, text)

    def close(self) -> None:
        """Wait for the blob that is being written; the others are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _write(self, directory: Path, lease: Lease, binding: str) -> None:
        try:
            write_blob(directory, lease.rows, binding=binding)
        except FileNotFoundError:
            # The directory belonged to a version that was deleted, and may have come back meanwhile.
            logger.debug("adapter %s: deleted while %s was written", directory.name, BLOB_NAME)
        except OSError as error:
            self.complain(directory, f"{BLOB_NAME} cannot be written ({error.strerror}); loads read the adapter")

    def _written(self, lease: Lease, writing: "concurrent.futures.Future[None]") -> None:
        lease.release()
        with self._lock:
            self._unwritten -= 1
        if not writing.cancelled() and writing.exception() is not None:
            logger.error("a serving blob could not be written", exc_info=writing.exception())


def _yield_to_others() -> None:
    """Let the calling thread run when no other wants to: on Linux, niceness is a thread's own."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
