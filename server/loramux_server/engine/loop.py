"""The engine process's loop: commands in, one step, events out; it sleeps only when there is nothing to do."""

import logging
import time
from collections.abc import Callable

from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import Ready
from loramux_server.engine.transport import Channel, PeerGone

_STALL_POLL = 0.001
_FLUSH_PATIENCE = 2.0

logger = logging.getLogger(__name__)


def serve(
    engine: Engine,
    channel: Channel,
    ready: Ready,
    *,
    terminated: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run until `Shutdown`, a termination signal, or the front end's death.

    Args:
        engine: A fresh engine.
        channel: Its socket; the caller closes it.
        ready: Sent first.
        terminated: Whether a termination signal has come.
        clock: Monotonic seconds, the engine's clock.

    Raises:
        Exception: Whatever ends the engine; the process must not go on.
    """
    try:
        channel.send([ready])
        while not engine.stopping:
            _sleep_if_idle(engine, channel, clock)
            engine.handle(channel.receive())
            if terminated():
                logger.info("terminating")
                engine.shut_down()
            if channel.congested:
                channel.flush()
            elif engine.has_work:
                channel.send(engine.step())
            else:
                channel.flush()
        _drain(engine, channel, clock)
    except PeerGone:
        logger.warning("the front end is gone")


def _sleep_if_idle(engine: Engine, channel: Channel, clock: Callable[[], float]) -> None:
    if channel.congested or not engine.has_work:
        channel.wait(None)
    elif engine.stalled:
        timer = engine.next_timer()
        # A load that ends wakes nobody; its poll is cheap.
        channel.wait(_STALL_POLL if timer is None else min(_STALL_POLL, timer - clock()))


def _drain(engine: Engine, channel: Channel, clock: Callable[[], float]) -> None:
    """Send the last events, for a bounded time."""
    channel.send(engine.step())
    until = clock() + _FLUSH_PATIENCE
    while not channel.flushed and clock() < until:
        channel.wait(until - clock())
        channel.flush()
