"""The only waiting queue: requests by fairness key, ordered by priority and arrival within a key."""

import bisect
from collections.abc import Iterator

from loramux_server.engine.request import Request


def _rank(request: Request) -> tuple[int, int]:
    return (-request.add.priority, request.order)


class WaitingQueue:
    """Requests that are not running; preempted ones return to their place."""

    def __init__(self) -> None:
        self._queues: dict[str, list[Request]] = {}
        self._size = 0
        self.changes = 0
        """Counts every push and remove."""

    def __len__(self) -> int:
        """Number of waiting requests."""
        return self._size

    def __iter__(self) -> Iterator[Request]:
        """Every waiting request, key by key; the queue must not change meanwhile."""
        for queue in self._queues.values():
            yield from queue

    def push(self, request: Request) -> None:
        """Enter a request."""
        bisect.insort(self._queues.setdefault(request.add.fairness_key, []), request, key=_rank)
        self._size += 1
        self.changes += 1

    def remove(self, request: Request) -> None:
        """Take a waiting request out."""
        key = request.add.fairness_key
        queue = self._queues[key]
        index = bisect.bisect_left(queue, _rank(request), key=_rank)
        assert queue[index] is request, "a waiting request lost its place"
        del queue[index]
        self._size -= 1
        self.changes += 1
        if not queue:
            del self._queues[key]

    def snapshot(self) -> dict[str, list[Request]]:
        """The queue of each key in the order to be tried; safe against changes of this object."""
        return {key: list(queue) for key, queue in self._queues.items()}
