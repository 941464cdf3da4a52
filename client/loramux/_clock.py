"""Time and chance, in one place so that tests can replace them."""

from __future__ import annotations

import asyncio
import random
import threading
import time


class Clock:
    """The real ones."""

    def now(self) -> float:
        """Return monotonic seconds."""
        return time.monotonic()

    def random(self) -> float:
        """Return a uniform number in [0, 1)."""
        # Spreads retries in time; nothing secret hangs on it.
        return random.random()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Sleep unless `event` is set meanwhile; True if it was."""
        return event.wait(seconds)

    async def wait_async(self, event: asyncio.Event, seconds: float) -> bool:
        """Sleep on the running loop unless `event` is set meanwhile; True if it was."""
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True

    async def sleep(self, seconds: float) -> None:
        """Sleep on the running loop."""
        await asyncio.sleep(seconds)
