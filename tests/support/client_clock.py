"""A clock for the SDK that never sleeps."""

import asyncio
import threading

from loramux._clock import Clock


class FakeClock(Clock):
    """Counts the sleeps and moves its own time by them; chance is always a half.

    Attributes:
        slept: Seconds of every sleep.
    """

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._now = 1000.0

    def now(self) -> float:
        """Return the fake time."""
        return self._now

    def random(self) -> float:
        """Return a half."""
        return 0.5

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Move the time."""
        self._sleep(seconds)
        return event.is_set()

    async def wait_async(self, event: asyncio.Event, seconds: float) -> bool:
        """Move the time."""
        self._sleep(seconds)
        return event.is_set()

    async def sleep(self, seconds: float) -> None:
        """Move the time."""
        self._sleep(seconds)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._now += seconds
