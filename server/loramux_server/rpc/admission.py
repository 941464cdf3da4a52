"""The hard bound on requests that wait: refused at once when full, never queued without limit."""

import asyncio
from collections import deque

from loramux_server.errors import Reason, ResourceExhausted


class Ticket:
    """A place in the queue of one request; given back once, at `Started` or at the end."""

    def __init__(self, gate: "AdmissionGate") -> None:
        """Create a ticket that its gate has counted."""
        self._gate: AdmissionGate | None = gate

    def leave(self) -> None:
        """Give the place back. Idempotent."""
        gate, self._gate = self._gate, None
        if gate is not None:
            gate._leave()


class AdmissionGate:
    """Counts requests between validation and their start in the engine."""

    def __init__(self, *, max_queued: int, retry_after: float = 1.0) -> None:
        """Create an empty gate.

        Args:
            max_queued: Requests that may wait at once, those being tokenized included.
            retry_after: Seconds that a refused caller is told to wait.
        """
        self._max_queued = max_queued
        self._retry_after = retry_after
        self._queued = 0
        self._patient: deque[asyncio.Future[Ticket]] = deque()

    @property
    def queued(self) -> int:
        """Places taken."""
        return self._queued

    @property
    def max_queued(self) -> int:
        """Places in all."""
        return self._max_queued

    def enter(self) -> Ticket:
        """Take a place.

        Raises:
            ResourceExhausted: QUEUE_FULL; nothing was taken.
        """
        if self._queued >= self._max_queued:
            raise ResourceExhausted(
                Reason.QUEUE_FULL,
                f"{self._queued} requests wait and the queue holds {self._max_queued}; retry later or on another "
                "replica",
                retry_after=self._retry_after,
            )
        return self._take()

    async def enter_when_calm(self) -> Ticket:
        """Wait until less than half of the places are taken, then take one; for batches, which leave room for others.

        Those who wait are served in order.
        """
        if not self._patient and self._calm:
            return self._take()
        turn: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._patient.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                turn.result().leave()
            raise

    @property
    def _calm(self) -> bool:
        return self._queued < max(1, self._max_queued // 2)

    def _take(self) -> Ticket:
        self._queued += 1
        return Ticket(self)

    def _leave(self) -> None:
        self._queued -= 1
        assert self._queued >= 0, "a ticket was counted twice"
        while self._patient and self._calm:
            turn = self._patient.popleft()
            if not turn.done():
                turn.set_result(self._take())
