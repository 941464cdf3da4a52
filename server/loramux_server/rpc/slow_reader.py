"""Giving up response streams that nobody reads."""

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowReader:
    """When a stalled stream is given up: more than `pending_bytes` wait and no write completed for `seconds`."""

    pending_bytes: int = 64 * 1024
    seconds: float = 30.0


class MeteredStream(Protocol):
    """A response iterator that knows how much output waits behind it."""

    @property
    def pending_bytes(self) -> int:
        """Bytes of output that wait for the reader."""
        ...


class StallGuard:
    """Cancels the task of a stream that nobody reads; one timer a stream, not one a message.

    Attributes:
        tripped: Whether it has cancelled the task.
        writing_since: Monotonic seconds at which the write in progress began; None between writes. The task sets it.
    """

    def __init__(self, limit: SlowReader, responses: object) -> None:
        """Watch from now on; call it in the task that writes.

        Args:
            limit: When the stream is given up.
            responses: Watched only if it is a `MeteredStream`.
        """
        self.tripped = False
        self.writing_since: float | None = None
        self._limit = limit
        self._responses = responses
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        if hasattr(responses, "pending_bytes"):
            self._arm()

    def close(self) -> None:
        """Stop watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._limit.seconds / 4, self._check)

    def _check(self) -> None:
        since = self.writing_since
        stalled = since is not None and time.monotonic() - since >= self._limit.seconds
        if stalled and getattr(self._responses, "pending_bytes", 0) > self._limit.pending_bytes:
            self.tripped = True
            self._timer = None
            assert self._task is not None
            self._task.cancel()
        else:
            self._arm()
