"""What crosses the socket between the front end and the validation worker: msgpack behind a 4-byte big-endian length.

One request is under way at a time. Imports no torch and no asyncio.
"""

import struct

import msgspec

MAX_FRAME_BYTES = 1 << 20
LENGTH = struct.Struct(">I")


class WorkerFrameError(Exception):
    """The peer broke the framing; the connection is of no use any more."""


class ValidateAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="validate_adapter"):
    """Check an adapter directory against the served base.

    Attributes:
        id: Echoed in the reply.
        directory: The PEFT directory.
        base_config: The base's `config.json`.
        max_rank: Largest rank taken.
        base_fingerprint: Digest of the served base.
        base_parts: Its parts, to name what differs.
        allow_unverified: Take adapters without a manifest.
    """

    id: int
    directory: str
    base_config: str
    max_rank: int
    base_fingerprint: str
    base_parts: dict[str, str]
    allow_unverified: bool


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """First frame of the worker: it runs under its limits."""


class Validated(msgspec.Struct, frozen=True, kw_only=True, tag="validated"):
    """The adapter can be served.

    Attributes:
        id: Of the request.
        digest: Version digest, 64 hex digits.
        rank: Largest rank of a module.
        rank_units: Units of 16 rank rows that it takes.
        modules: Names of the linear modules that it changes, sorted.
        tensor_bytes: Bytes of its tensors.
        base_fingerprint: Base that its manifest names; "" without a manifest.
        base_verified: Whether that is the served base.
    """

    id: int
    digest: str
    rank: int
    rank_units: int
    modules: tuple[str, ...]
    tensor_bytes: int
    base_fingerprint: str
    base_verified: bool


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The adapter cannot be served.

    Attributes:
        id: Of the request.
        reason: As in `AdapterFormatError`.
        field: What it is about.
        message: For the caller.
    """

    id: int
    reason: str
    field: str
    message: str


class Unreadable(msgspec.Struct, frozen=True, kw_only=True, tag="unreadable"):
    """The files could not be read: says nothing about the adapter.

    Attributes:
        id: Of the request.
        message: The operating system's words, without a path.
    """

    id: int
    message: str


Answer = Validated | Refused | Unreadable
Reply = Started | Answer

_ENCODER = msgspec.msgpack.Encoder()
REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
REQUESTS: msgspec.msgpack.Decoder[ValidateAdapter] = msgspec.msgpack.Decoder(ValidateAdapter)


def encode(message: ValidateAdapter | Reply) -> bytes:
    """A frame, length included.

    Raises:
        WorkerFrameError: It is larger than `MAX_FRAME_BYTES`.
    """
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WorkerFrameError(f"a frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


def body_length(prefix: bytes) -> int:
    """Length of the body that follows.

    Raises:
        WorkerFrameError: Out of bounds.
    """
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_FRAME_BYTES:
        raise WorkerFrameError(f"a frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return int(length)
