"""Frames of the socket between front end and engine: a 4-byte big-endian length and a msgpack body.

Used by both sides, so it imports neither torch nor asyncio. Bytes go in as they arrive, whole frames come out.
"""

import struct
from typing import Generic, TypeVar

import msgspec

from loramux_server.engine.messages import MAX_FRAME_BYTES, CommandFrame, EventFrame

_LENGTH = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()

Frame = TypeVar("Frame", CommandFrame, EventFrame)


class FrameError(Exception):
    """The peer broke the framing, or a frame is too large; the connection is of no use any more."""


def encode_frame(frame: CommandFrame | EventFrame) -> bytes:
    """A frame as bytes, length included.

    Raises:
        FrameError: It is larger than `MAX_FRAME_BYTES`.
    """
    body = _ENCODER.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder(Generic[Frame]):
    """Cuts a byte stream into frames.

    Args:
        kind: `CommandFrame` in the engine, `EventFrame` in the front end.
    """

    def __init__(self, kind: type[Frame]) -> None:
        self._decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by `data`, in order.

        Raises:
            FrameError: A length is out of bounds or a body is not a frame.
        """
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            try:
                frames.append(self._decoder.decode(memoryview(self._buffer)[start + _LENGTH.size : end]))
            except msgspec.MsgspecError as error:
                raise FrameError(f"a frame of {length} bytes cannot be read: {error}") from error
            start = end
        del self._buffer[:start]
        return frames
