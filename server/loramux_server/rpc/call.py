"""What a servicer's handler knows about its call, and how a servicer lists its handlers.

Servicers see parsed requests and a `Call`; they know neither a gRPC context nor bytes. The front end registers every
`Method` of every servicer's `methods()` under its full name, parses, calls, and turns domain errors into statuses.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf.message import Message

MethodKind = Literal["unary_unary", "unary_stream", "stream_unary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, after authentication.

    Attributes:
        tenant: The tenant that the principal acts for.
        principal: Who calls.
        correlation_id: Bounded and validated; for logs only, never a key.
        deadline: `time.monotonic()` at which the call ends; None = no deadline.
    """

    tenant: str
    principal: str
    correlation_id: str
    deadline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC of a servicer.

    Attributes:
        request_type: Message class of a request (of each one of a client stream).
        handler: `unary_unary`: coroutine function (request, call) -> response. `unary_stream`: (request, call) ->
            async iterator of responses. `stream_unary`: coroutine function (async iterator of requests, call) ->
            response.
        kind: Arity of the RPC.
        max_bytes: Of one request message. Parsing happens on the event loop, and a message of many tiny parts takes
            long, so each RPC takes what it has a use for.
    """

    request_type: type[Message]
    handler: Callable[[Any, Call], Any]
    kind: MethodKind
    max_bytes: int = 64 * 1024
