"""The one way into every RPC: bytes in, domain errors out as statuses, nothing else leaks.

Handlers are registered on bytes and parse themselves, since a parse failure inside gRPC comes out as UNKNOWN with the
name of a Python class. In order: correlation id, drain gate, authentication, tenant, wait for a revision, parse,
handler, status. Any exception that is not a domain error becomes INTERNAL with the correlation id; its stack goes to
the log only.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from loramux_server.errors import (
    Expired,
    Internal,
    InvalidRequest,
    LoramuxServerError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.rpc.call import Call, Method
from loramux_server.rpc.slow_reader import SlowReader, StallGuard
from loramux_server.rpc.status import Trailers, code_of, to_status, trailers_of
from loramux_server.telemetry.context import CORRELATION_ID, GENERATION_ID, correlation_id_from
from loramux_server.tenancy.access import Acting

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]
T = TypeVar("T")

_DROP_SECONDS = 30.0
_IDLE_SECONDS = 60.0
_MAX_DROPPED = 65_536
_SINGLE = ("authorization", "x-loramux-tenant")


class Authorizer(Protocol):
    """Turns metadata into whom the call acts for, if it may be made at all."""

    def authorize(self, method: str, metadata: Mapping[str, str]) -> Acting:
        """Check credential, tenant and role for a full method name.

        Raises:
            LoramuxServerError: UNAUTHENTICATED or PERMISSION_DENIED.
        """
        ...


class RevisionCheck(Protocol):
    """Holds a call back until this replica is as new as the call asks."""

    async def check(self, metadata: Mapping[str, str]) -> None:
        """Wait, within bounds.

        Raises:
            LoramuxServerError: It cannot be waited for.
        """
        ...


class CallObserver(Protocol):
    """Telemetry of one RPC; created when it arrives, ended exactly once."""

    def ended(self, *, code: str, reason: str) -> None:
        """Record the outcome.

        Args:
            code: Status code name (`OK`, `NOT_FOUND`).
            reason: `Reason` value, or "" when there is none.
        """
        ...


ObserveCall = Callable[[str, Mapping[str, str]], CallObserver]


class Pipeline(grpc.GenericRpcHandler):
    """Serves the methods of all services."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        *,
        authorizer: Authorizer,
        observe: ObserveCall,
        revisions: RevisionCheck | None = None,
        endless: frozenset[str] = frozenset(),
        slow_reader: SlowReader = SlowReader(),  # noqa: B008 - frozen
    ) -> None:
        """Create the handler.

        Args:
            methods: By full name, `/package.Service/Method`.
            authorizer: See `Authorizer`.
            observe: Called at the start of each RPC with method and text metadata.
            revisions: Asked after authentication; None = calls never wait for a revision.
            endless: Methods whose streams never end by themselves; a drain ends them.
            slow_reader: Limits for response streams.
        """
        self._methods = dict(methods)
        self._authorizer = authorizer
        self._observe = observe
        self._revisions = revisions
        self._slow_reader = slow_reader
        self._endless = endless
        self._running: dict[asyncio.Task[Any], str] = {}
        self._drained: set[asyncio.Task[Any]] = set()
        self._writing: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._handlers = {name: self._handler(name, method) for name, method in self._methods.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """Find the handler of a method; None lets gRPC answer UNIMPLEMENTED."""
        return self._handlers.get(handler_call_details.method)

    # --- drain -----------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Refuse new calls from now on, and end the streams that would never end."""
        self._draining = True
        for task, name in self._running.items():
            if name in self._endless:
                self._drained.add(task)
                # grpc.aio loses the status of a call whose write was cancelled half way: such a call ends after it.
                if task not in self._writing:
                    task.cancel()

    @property
    def running(self) -> int:
        """Calls in progress."""
        return len(self._running)

    async def wait_idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    # --- one call --------------------------------------------------------------------------------------------------

    def _handler(self, name: str, method: Method) -> "grpc.RpcMethodHandler[bytes, bytes]":
        handler: grpc.RpcMethodHandler[bytes, bytes]
        if method.kind == "unary_unary":

            async def unary(request: bytes, context: Context) -> bytes:
                async def respond(call: Call) -> bytes:
                    response: Message = await method.handler(_parse(method, request), call)
                    return response.SerializeToString()

                return await self._run(name, context, respond)

            handler = grpc.unary_unary_rpc_method_handler(unary)
        elif method.kind == "unary_stream":

            async def stream(request: bytes, context: Context) -> None:
                async def respond(call: Call) -> None:
                    await self._write_all(method.handler(_parse(method, request), call), context)

                await self._run(name, context, respond)

            handler = grpc.unary_stream_rpc_method_handler(stream)
        else:

            async def collect(requests: AsyncIterator[bytes], context: Context) -> bytes:
                async def respond(call: Call) -> bytes:
                    response: Message = await method.handler(_parse_each(method, requests), call)
                    return response.SerializeToString()

                return await self._run(name, context, respond, requests)

            handler = grpc.stream_unary_rpc_method_handler(collect)
        return handler

    async def _run(
        self,
        name: str,
        context: Context,
        respond: Callable[[Call], Awaitable[T]],
        requests: AsyncIterator[bytes] | None = None,
    ) -> T:
        task = asyncio.current_task()
        assert task is not None
        received = tuple(context.invocation_metadata() or ())
        metadata = _text_metadata(received)
        correlation_id = correlation_id_from(metadata.get("x-request-id"))
        CORRELATION_ID.set(correlation_id)
        GENERATION_ID.set("")
        observer = self._observe(name, metadata)
        trailers: Trailers = (("x-request-id", correlation_id),)
        code, reason = "CANCELLED", ""
        error: LoramuxServerError
        self._running[task] = name
        self._idle.clear()
        try:
            try:
                context.set_trailing_metadata(trailers)
                if self._draining:
                    raise _draining()
                _check_unrepeated(received)
                acting = self._authorizer.authorize(name, metadata)
                if self._revisions is not None:
                    await self._revisions.check(metadata)
                remaining = context.time_remaining()
                call = Call(
                    tenant=acting.tenant,
                    principal=acting.principal,
                    correlation_id=correlation_id,
                    deadline=None if remaining is None else time.monotonic() + remaining,
                )
                response = await respond(call)
                code = "OK"
                return response
            except asyncio.CancelledError:
                if task in self._drained:
                    task.uncancel()
                    error = _draining()
                else:
                    code, reason = _cause_of_cancel(context)
                    raise
            except LoramuxServerError as domain_error:
                error = domain_error
                if isinstance(error, Internal):
                    _log.exception("internal error in %s", name)
            except Exception as bug:  # noqa: BLE001 - converted: INTERNAL for the caller, the stack for the log
                _log.exception("unexpected %s in %s", type(bug).__name__, name)
                error = Internal(
                    Reason.INTERNAL, f"internal error; the server's log has it under correlation id {correlation_id}"
                )
            code, reason = code_of(error).name, error.reason.value
            _log.info("%s answered %s, %s", name, code, reason)
            status = to_status(error)
            if requests is not None and not isinstance(error, Expired):
                await _read_to_end(requests)
            await context.abort(code_of(error), status.message, trailers + trailers_of(status, error))
        finally:
            observer.ended(code=code, reason=reason)
            self._running.pop(task, None)
            self._drained.discard(task)
            if not self._running:
                self._idle.set()

    async def _write_all(self, responses: AsyncIterator[Message], context: Context) -> None:
        """Write a response stream; the iterator is closed however this ends, so that its `finally` blocks run."""
        guard = StallGuard(self._slow_reader, responses)
        task = asyncio.current_task()
        assert task is not None
        try:
            async for response in responses:
                guard.writing_since = time.monotonic()
                self._writing.add(task)
                try:
                    await context.write(response.SerializeToString())
                finally:
                    self._writing.discard(task)
                guard.writing_since = None
                if task in self._drained:
                    raise _draining()
        except asyncio.CancelledError:
            if not guard.tripped:
                raise
            task.uncancel()
            raise ResourceExhausted(
                Reason.SLOW_READER,
                f"the stream was not read for {self._slow_reader.seconds:g} s while more than "
                f"{self._slow_reader.pending_bytes} bytes of output waited; read faster or ask for less output",
            ) from None
        finally:
            guard.close()
            close = getattr(responses, "aclose", None)
            if close is not None:
                await close()


def _draining() -> Unavailable:
    return Unavailable(Reason.DRAINING, "this server is shutting down; use another replica", retry_after=1.0)


def _cause_of_cancel(context: Context) -> tuple[str, str]:
    """Code and reason of a call that the client's deadline or the client itself ended."""
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return "DEADLINE_EXCEEDED", Reason.DEADLINE_EXCEEDED.value
    return "CANCELLED", ""


def _text_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """Keep the first value of each text key; the transport has bounded their size."""
    texts: dict[str, str] = {}
    for key, value in metadata:
        if isinstance(value, str):
            texts.setdefault(key, value)
    return texts


def _check_unrepeated(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuse metadata that says twice who calls or for whom: which of the values counts would be a guess."""
    for name in _SINGLE:
        count = sum(1 for key, _ in metadata if key == name)
        if count > 1:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER, f"metadata {name} is given {count} times; give it once", field=name
            )


def _parse(method: Method, request: bytes) -> Message:
    name = method.request_type.DESCRIPTOR.full_name
    if len(request) > method.max_bytes:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER, f"the {name} has {len(request)} bytes; send at most {method.max_bytes}"
        )
    try:
        return method.request_type.FromString(request)
    except DecodeError:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER,
            f"the {len(request)} bytes of the request are not a {name}; build it from the published .proto files",
        ) from None


async def _read_to_end(requests: AsyncIterator[bytes]) -> None:
    """Drop the rest of a client stream, within bounds.

    One that is refused before its end reaches the caller as INTERNAL, without our reason.
    """
    count = 0
    try:
        async with asyncio.timeout(_DROP_SECONDS):
            async for _ in requests:
                count += 1
                if count >= _MAX_DROPPED:
                    return
    except TimeoutError:
        _log.info("a client kept on sending %g s after its call was refused", _DROP_SECONDS)


async def _parse_each(method: Method, requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    stream = aiter(requests)
    while True:
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                request = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Expired(
                Reason.DEADLINE_EXCEEDED, f"no message came for {_IDLE_SECONDS:g} s; send on, or call again"
            ) from None
        yield _parse(method, request)
