"""The engine's end of the socket: non-blocking both ways, one frame of events at a time in flight.

While a frame is still being written, new events wait in an `EventBuffer`, where tokens of one sequence are merged; so a
lagging front end makes frames larger, not more of them. Past `MAX_BACKLOG_UNITS` the channel is congested and the step
loop waits instead of stepping.
"""

import os
import select
import socket

from loramux_server.engine.event_buffer import EventBuffer
from loramux_server.engine.frames import FrameDecoder, encode_frame
from loramux_server.engine.messages import Command, CommandFrame, Event, EventFrame

MAX_BACKLOG_UNITS = 262144
"""Tokens, log-probabilities and events that may wait for the front end."""

_READ_BYTES = 1 << 18


class PeerGone(Exception):
    """The other end of the socket is closed: the front end is dead."""


class Channel:
    """Socket to the front end.

    Args:
        connection: A connected stream socket; the channel owns it.
        epoch: Put into every event frame.
        wakeup_fd: A descriptor that ends `wait` when readable (signals); it is drained there.
    """

    def __init__(self, connection: socket.socket, *, epoch: int, wakeup_fd: int | None = None) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._epoch = epoch
        self._wakeup_fd = wakeup_fd
        self._decoder: FrameDecoder[CommandFrame] = FrameDecoder(CommandFrame)
        self._waiting = EventBuffer()
        self._outgoing = memoryview(b"")
        self._frames = 0

    @property
    def congested(self) -> bool:
        """Whether so much waits for the front end that no step should be run."""
        return self._waiting.units > MAX_BACKLOG_UNITS

    @property
    def flushed(self) -> bool:
        """Whether everything sent is in the kernel's hands."""
        return not self._outgoing and not self._waiting

    def wait(self, timeout: float | None) -> None:
        """Sleep until a command, room for waiting events, a signal, or the timeout in seconds."""
        poller = select.poll()
        poller.register(self._connection, select.POLLIN | (0 if self.flushed else select.POLLOUT))
        if self._wakeup_fd is not None:
            poller.register(self._wakeup_fd, select.POLLIN)
        for descriptor, _ in poller.poll(None if timeout is None else max(0.0, timeout) * 1000):
            if descriptor == self._wakeup_fd:
                os.read(descriptor, 4096)

    def receive(self) -> list[Command]:
        """Commands that have arrived; never blocks.

        Raises:
            PeerGone: End of file.
            FrameError: The front end broke the framing.
        """
        commands: list[Command] = []
        while True:
            try:
                data = self._connection.recv(_READ_BYTES)
            except BlockingIOError:
                return commands
            except ConnectionError as error:
                raise PeerGone from error
            if not data:
                raise PeerGone
            for frame in self._decoder.feed(data):
                commands.extend(frame.commands)
            if len(data) < _READ_BYTES:
                return commands

    def send(self, events: list[Event]) -> None:
        """Hand over a step's events and write what the socket takes; never blocks.

        Raises:
            PeerGone: The front end closed the socket.
        """
        self._waiting.push(events)
        self.flush()

    def flush(self) -> None:
        """Write what the socket takes now.

        Raises:
            PeerGone: The front end closed the socket.
        """
        while True:
            if not self._outgoing:
                if not self._waiting:
                    return
                frame = EventFrame(epoch=self._epoch, step=self._frames, events=self._waiting.pop_frame())
                self._frames += 1
                self._outgoing = memoryview(encode_frame(frame))
            try:
                written = self._connection.send(self._outgoing)
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise PeerGone from error
            self._outgoing = self._outgoing[written:]

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()
