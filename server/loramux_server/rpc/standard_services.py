"""Health and reflection as their packages serve them, but for requests that do not parse.

Inside gRPC a parse failure comes out as UNKNOWN with the name of a Python class, and as a stack in our log.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

Handler = Any  # grpc.RpcMethodHandler, whose fields its types do not know


class ParsingServer:
    """What generated `add_*_to_server` functions take for a server: wraps the handlers and passes them on."""

    def __init__(self, server: grpc.aio.Server) -> None:
        """Create it.

        Args:
            server: Gets the handlers.
        """
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[object]) -> None:
        """Ignore them: the same handlers come by `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Register the methods of a service."""
        wrapped = {name: _wrapped(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


def _wrapped(handler: Handler) -> Handler:
    parse: Callable[[bytes], Any] = handler.request_deserializer

    async def parsed(request: bytes, context: Any) -> Any:
        try:
            return parse(request)
        except DecodeError:
            await _refuse(context)

    if handler.unary_unary is not None:

        async def unary(request: bytes, context: Any) -> Any:
            return await handler.unary_unary(await parsed(request, context), context)

        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=handler.response_serializer)
    if handler.unary_stream is not None:

        async def stream(request: bytes, context: Any) -> None:
            await handler.unary_stream(await parsed(request, context), context)

        return grpc.unary_stream_rpc_method_handler(stream, response_serializer=handler.response_serializer)

    async def messages(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for request in requests:
            yield parse(request)

    async def both(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
        try:
            async for response in handler.stream_stream(messages(requests), context):
                yield response
        except DecodeError:
            await _refuse(context)

    return grpc.stream_stream_rpc_method_handler(both, response_serializer=handler.response_serializer)


async def _refuse(context: Any) -> None:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no message of this method; see its .proto")
