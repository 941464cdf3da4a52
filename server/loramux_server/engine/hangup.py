"""The front end's death while the engine is still being built: nobody reads the socket then, so a thread watches it."""

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Iterator

_POLL_MS = 100

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def ended_by_hangup(connection: socket.socket) -> Iterator[None]:
    """End this process, with code 0, if the other end of the socket closes inside the block.

    Without it a long load would go on, and keep device memory, until the engine first looks at its socket.

    Args:
        connection: Socket to the front end; nothing is read from it.
    """
    over = threading.Event()

    def watch() -> None:
        poller = select.poll()
        # No event is asked for: a hang-up is reported all the same, commands that wait are not.
        poller.register(connection, 0)
        while not over.is_set():
            if poller.poll(_POLL_MS) and not over.is_set():
                logger.warning("the front end is gone; the engine's start is given up")
                os._exit(0)

    threading.Thread(target=watch, name="hangup", daemon=True).start()
    try:
        yield
    finally:
        over.set()
