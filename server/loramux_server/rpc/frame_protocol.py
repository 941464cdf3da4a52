"""The receiving end of the engine socket: from bytes to event frames."""

import asyncio
from collections.abc import Callable

from loramux_server.engine import messages as wire
from loramux_server.engine.frames import FrameDecoder, FrameError


class FrameProtocol(asyncio.Protocol):
    """Splits the byte stream into frames; the protocol of one connection."""

    def __init__(self, on_frame: Callable[[wire.EventFrame], None], on_end: Callable[[str], None]) -> None:
        """Create a protocol that is not connected.

        Args:
            on_frame: Called with each frame.
            on_end: Called with the reason when the connection ends, perhaps more than once.
        """
        self._on_frame = on_frame
        self._on_end = on_end
        self._frames = FrameDecoder(wire.EventFrame)
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Pass on the frames that are complete; a peer that breaks the framing is cut off."""
        try:
            for frame in self._frames.feed(data):
                self._on_frame(frame)
        except FrameError as error:
            self._on_end(f"the engine broke the protocol: {error}")
            if self.transport is not None:
                self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell why."""
        self._on_end("the engine closed its socket" if exc is None else f"the engine's socket failed: {exc}")
