"""Calls of the asyncio client: one channel on one loop, attempts, errors."""

# A timeout here is the deadline of a call, which the server gets too.
# ruff: noqa: ASYNC109
from __future__ import annotations

import asyncio
import inspect
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic

import grpc
from google.protobuf.message import Message

from loramux._clock import Clock
from loramux._connection import Connection, View, call_metadata, checked_timeout, checked_token, new_request_id
from loramux._errors import Cancelled, ClientStateError
from loramux._methods import Method, Q, R
from loramux._requests import check_size
from loramux._retry import Attempts, RetryBudget, RetryPolicy
from loramux._status import Failure, failure_from_call
from loramux._tracing import start_span


def failure_of(error: grpc.aio.AioRpcError, *, request_id: str, headers_seen: bool, tls: bool) -> Failure:
    """Convert what a call raised."""
    return failure_from_call(
        error.code().name,
        error.details() or "",
        tuple(error.trailing_metadata() or ()),
        headers_seen=headers_seen or bool(error.initial_metadata()),
        request_id=request_id,
        tls=tls,
    )


def task_is_cancelled() -> bool:
    """Whether somebody cancelled the running task, and not only a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncTransport:
    """One channel and what its calls share.

    The channel is made at the first call, on the loop that runs then, and stays on it.

    Args:
        connection: Where to connect.
        token: Token, or a callable asked before each attempt; it may be a coroutine function.
        policy: Retries.
        timeout: Seconds a unary call may take unless it says otherwise; None for no limit.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        token: str | Callable[[], str | Awaitable[str]] | None,
        policy: RetryPolicy,
        timeout: float | None,
    ) -> None:
        self.clock = Clock()
        self.budget = RetryBudget()
        self.policy = policy
        self._connection = connection
        self._token = token
        self._timeout = timeout
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closed = False
        # grpc.aio finds only those calls at close that wait for something at that moment.
        self.calls: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def target(self) -> str:
        """Where it connects."""
        return self._connection.target

    @property
    def tls(self) -> bool:
        """Whether it uses TLS."""
        return self._connection.tls is not None

    @property
    def closed(self) -> bool:
        """Whether the client was closed."""
        return self._closed

    def channel(self) -> grpc.aio.Channel:
        """Return the channel.

        Raises:
            ClientStateError: The client is closed, belongs to another loop, or was used by the parent before a fork.
        """
        if self._closed:
            raise ClientStateError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            credentials = self._connection.credentials()
            target, options = self._connection.target, self._connection.options
            self._pid, self._loop = os.getpid(), loop
            self._channel = (
                grpc.aio.insecure_channel(target, options)
                if credentials is None
                else grpc.aio.secure_channel(target, credentials, options)
            )
        if self._pid != os.getpid():
            raise ClientStateError("the client was used before a fork; make a new one in the child process")
        if self._loop is not loop:
            raise ClientStateError("the client belongs to another event loop; make one for each loop")
        return self._channel

    async def close(self) -> None:
        """Close the channel; running calls end with an error."""
        self._closed = True
        channel, self._channel = self._channel, None
        # A channel of the parent process or of another loop must not be touched.
        if channel is not None and self._pid == os.getpid() and self._loop is asyncio.get_running_loop():
            for call in list(self.calls):
                call.cancel()
            await channel.close()

    async def metadata(self, view: View, request_id: str) -> list[tuple[str, str]]:
        """Build the metadata of an attempt."""
        token: object = self._token() if callable(self._token) else self._token
        if inspect.isawaitable(token):
            token = await token
        return call_metadata(view, token=None if token is None else checked_token(token), request_id=request_id)

    def attempts(self, timeout: float | None) -> Attempts:
        """Begin the attempts of a call that may take `timeout` seconds."""
        return Attempts(
            self.policy,
            self.budget,
            deadline=None if timeout is None else self.clock.now() + timeout,
            now=self.clock.now,
            random=self.clock.random,
        )

    async def pause(self, seconds: float) -> None:
        """Sleep between attempts."""
        await self.clock.sleep(seconds)

    async def unary(self, method: Method[Q, R], request: Q, view: View, *, timeout: float | None = None) -> R:
        """Make a call with one request and one response, with retries.

        Raises:
            LoramuxError: It failed.
        """
        check_size(request)
        request_id = new_request_id()
        attempts = self.attempts(checked_timeout(timeout, self._timeout))
        span = start_span(method, view)
        try:
            while True:
                outcome = await self._attempt(method, request, view, attempts.remaining(), request_id, span.inject)
                if not isinstance(outcome, Failure):
                    attempts.succeeded()
                    span.end()
                    return outcome
                delay = attempts.wait_for(outcome)
                if delay is None:
                    raise outcome.error
                await self.pause(delay)
        except BaseException as error:
            span.end(error)
            raise

    async def _attempt(
        self,
        method: Method[Q, R],
        request: Q,
        view: View,
        timeout: float | None,
        request_id: str,
        inject: Callable[[list[tuple[str, str]]], None],
    ) -> R | Failure:
        """Make one attempt of a unary call."""
        metadata = await self.metadata(view, request_id)
        inject(metadata)
        begin: Any = self.channel().unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        outcome: R | Failure = await self._finish(begin(request, timeout=timeout, metadata=metadata), request_id)
        return outcome

    async def send_stream(
        self, method: Method[Q, R], requests: AsyncIterator[Q], view: View, *, timeout: float
    ) -> R | Failure:
        """Make one attempt of a call with many requests and one response."""
        request_id = new_request_id()
        metadata = await self.metadata(view, request_id)
        span = start_span(method, view)
        span.inject(metadata)
        begin: Any = self.channel().stream_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            outcome: R | Failure = await self._finish(
                begin(requests, timeout=checked_timeout(timeout, None), metadata=metadata), request_id
            )
        except BaseException as error:
            span.end(error)
            raise
        span.end(outcome.error if isinstance(outcome, Failure) else None)
        return outcome

    async def _finish(self, call: Any, request_id: str) -> Any:
        """Wait for the response of a call that has one."""
        self.calls.add(call)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            return failure_of(error, request_id=request_id, headers_seen=False, tls=self.tls)
        except asyncio.CancelledError:
            if not self._closed or task_is_cancelled():
                call.cancel()
                raise
        raise ClientStateError("the client was closed during the call", request_id=request_id)


class AsyncStreamCall(Generic[R]):
    """A call with one request and many responses; `open` retries, `read` does not.

    One task reads; `cancel` may come from any on the same loop.

    Args:
        transport: The channel.
        method: The method.
        request: The request.
        view: Tenant and the like.
        timeout: Seconds for the whole call; None for no limit.
        request_id: Correlation id; None mints one.
    """

    def __init__(
        self,
        transport: AsyncTransport,
        method: Method[Any, R],
        request: Message,
        view: View,
        *,
        timeout: float | None,
        request_id: str | None = None,
    ) -> None:
        self._transport = transport
        self._method = method
        self._request = request
        self._view = view
        self._timeout = timeout
        self.request_id = new_request_id() if request_id is None else request_id
        self.span = start_span(method, view)
        self._cancelled = asyncio.Event()
        self._call: Any = None
        self._first: R | None = None
        self._ended = False

    async def open(self) -> None:
        """Begin the call and wait for the first response.

        Raises:
            LoramuxError: The call was refused, retries included.
        """
        attempts = self._transport.attempts(self._timeout)
        try:
            while True:
                outcome = await self._attempt(attempts.remaining())
                if not isinstance(outcome, Failure):
                    attempts.succeeded()
                    self._first = outcome
                    return
                delay = attempts.wait_for(outcome)
                if delay is None:
                    raise outcome.error
                if await self._transport.clock.wait_async(self._cancelled, delay):
                    raise Cancelled("the call was cancelled", request_id=self.request_id)
        except BaseException as error:
            self.span.end(error)
            self.cancel()
            raise

    async def _attempt(self, timeout: float | None) -> R | None | Failure:
        """Make one attempt; the first response (None for an empty stream) if it has begun to answer."""
        metadata = await self._transport.metadata(self._view, self.request_id)
        self.span.inject(metadata)
        begin: Any = self._transport.channel().unary_stream(
            self._method.path,
            request_serializer=self._method.request.SerializeToString,
            response_deserializer=self._method.response.FromString,
        )
        self._call = begin(self._request, timeout=timeout, metadata=metadata)
        self._transport.calls.add(self._call)
        if self._cancelled.is_set():
            self._call.cancel()
        return await self._next(headers_seen=False)

    async def _next(self, *, headers_seen: bool) -> R | None | Failure:
        """Wait for the next response; None at the end."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            return failure_of(error, request_id=self.request_id, headers_seen=headers_seen, tls=self._transport.tls)
        except asyncio.CancelledError:
            # grpc.aio raises this for a call cancelled on this side as well; only a cancelled task may see it.
            if task_is_cancelled() or not (self._cancelled.is_set() or self._transport.closed):
                self._call.cancel()
                raise
            text = "the client was closed" if self._transport.closed else "the call was cancelled"
            return Failure(error=Cancelled(text, request_id=self.request_id), headers_seen=True)
        if message is grpc.aio.EOF:
            self._ended = True
            return None
        response: R = message
        return response

    async def read(self) -> R | None:
        """Wait for the next response; None at the end of the stream.

        Raises:
            LoramuxError: The call failed.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._ended:
            return None
        outcome = await self._next(headers_seen=True)
        if isinstance(outcome, Failure):
            self._ended = True
            self.span.end(outcome.error)
            raise outcome.error
        if outcome is None:
            self.span.end()
        return outcome

    def cancel(self) -> None:
        """End the call; nothing happens if it has ended."""
        self._cancelled.set()
        if self._call is not None:
            self._call.cancel()
        self.span.end()
