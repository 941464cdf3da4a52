"""Calls of the blocking client: one channel, attempts, errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

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

T = TypeVar("T")


def failure_of(error: grpc.RpcError, *, request_id: str, headers_seen: bool, tls: bool) -> Failure:
    """Convert what a call raised; `error` is the call itself, as gRPC has it."""
    call: Any = error
    return failure_from_call(
        call.code().name,
        call.details() or "",
        tuple(call.trailing_metadata() or ()),
        headers_seen=headers_seen or bool(call.initial_metadata()),
        request_id=request_id,
        tls=tls,
    )


class Transport:
    """One channel and what its calls share; safe for threads.

    The channel is made at the first call, so that a client made before a fork can be used after it.

    Args:
        connection: Where to connect.
        token: Token, or a callable asked before each attempt.
        policy: Retries.
        timeout: Seconds a unary call may take unless it says otherwise; None for no limit.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        token: str | Callable[[], str] | None,
        policy: RetryPolicy,
        timeout: float | None,
    ) -> None:
        self.clock = Clock()
        self.budget = RetryBudget()
        self.policy = policy
        self._connection = connection
        self._token = token
        self._timeout = timeout
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._pid = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the client was closed."""
        return self._closed

    @property
    def target(self) -> str:
        """Where it connects."""
        return self._connection.target

    @property
    def tls(self) -> bool:
        """Whether it uses TLS."""
        return self._connection.tls is not None

    def channel(self) -> grpc.Channel:
        """Return the channel.

        Raises:
            ClientStateError: The client is closed, or was used by the parent before a fork.
        """
        channel = self._channel
        if channel is None:
            with self._lock:
                # Looked at inside: a channel made after close() would never be closed.
                if self._closed:
                    raise ClientStateError("the client is closed")
                if self._channel is None:
                    credentials = self._connection.credentials()
                    target, options = self._connection.target, self._connection.options
                    self._pid = os.getpid()
                    self._channel = (
                        grpc.insecure_channel(target, options)
                        if credentials is None
                        else grpc.secure_channel(target, credentials, options)
                    )
                channel = self._channel
        if self._pid != os.getpid():
            raise ClientStateError("the client was used before a fork; make a new one in the child process")
        return channel

    def close(self) -> None:
        """Close the channel; running calls end with an error."""
        with self._lock:
            self._closed = True
            channel, self._channel = self._channel, None
        # A channel of the parent process must not be touched after a fork.
        if channel is not None and self._pid == os.getpid():
            channel.close()

    def metadata(self, view: View, request_id: str) -> list[tuple[str, str]]:
        """Build the metadata of an attempt."""
        token = self._token() if callable(self._token) else self._token
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

    def invoke(self, start: Callable[[], T]) -> T:
        """Run `start`, which begins a call, and tell a closed channel from other mistakes."""
        try:
            return start()
        except ValueError as error:
            if self._closed:
                raise ClientStateError("the client was closed") from error
            raise

    def pause(self, seconds: float) -> None:
        """Sleep between attempts."""
        self.clock.wait(threading.Event(), seconds)

    def unary(self, method: Method[Q, R], request: Q, view: View, *, timeout: float | None = None) -> R:
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
                outcome = self._attempt(method, request, view, attempts.remaining(), request_id, span.inject)
                if not isinstance(outcome, Failure):
                    attempts.succeeded()
                    span.end()
                    return outcome
                delay = attempts.wait_for(outcome)
                if delay is None:
                    raise outcome.error
                self.pause(delay)
        except BaseException as error:
            span.end(error)
            raise

    def _attempt(
        self,
        method: Method[Q, R],
        request: Q,
        view: View,
        timeout: float | None,
        request_id: str,
        inject: Callable[[list[tuple[str, str]]], None],
    ) -> R | Failure:
        """Make one attempt of a unary call."""
        metadata = self.metadata(view, request_id)
        inject(metadata)
        call = self.channel().unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            return self.invoke(lambda: call(request, timeout=timeout, metadata=tuple(metadata)))
        except grpc.RpcError as error:
            return failure_of(error, request_id=request_id, headers_seen=False, tls=self.tls)

    def send_stream(self, method: Method[Q, R], requests: Iterator[Q], view: View, *, timeout: float) -> R | Failure:
        """Make one attempt of a call with many requests and one response."""
        request_id = new_request_id()
        metadata = self.metadata(view, request_id)
        span = start_span(method, view)
        span.inject(metadata)
        call = self.channel().stream_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            response = self.invoke(
                lambda: call(requests, timeout=checked_timeout(timeout, None), metadata=tuple(metadata))
            )
        except grpc.RpcError as error:
            failure = failure_of(error, request_id=request_id, headers_seen=False, tls=self.tls)
            span.end(failure.error)
            return failure
        except BaseException as error:
            span.end(error)
            raise
        span.end()
        return response


class StreamCall(Generic[R]):
    """A call with one request and many responses; `open` retries, `read` does not.

    One thread reads; `cancel` may come from any.

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
        transport: Transport,
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
        self._cancelled = threading.Event()
        self._call: Any = None
        self._first: R | None = None
        self._ended = False

    def open(self) -> None:
        """Begin the call and wait for the first response.

        Raises:
            LoramuxError: The call was refused, retries included.
        """
        attempts = self._transport.attempts(self._timeout)
        try:
            while True:
                failure = self._attempt(attempts.remaining())
                if failure is None:
                    attempts.succeeded()
                    return
                delay = attempts.wait_for(failure)
                if delay is None:
                    raise failure.error
                if self._transport.clock.wait(self._cancelled, delay):
                    raise Cancelled("the call was cancelled", request_id=self.request_id)
        except BaseException as error:
            self.span.end(error)
            self.cancel()
            raise

    def _attempt(self, timeout: float | None) -> Failure | None:
        """Make one attempt; None if it has begun to answer."""
        metadata = self._transport.metadata(self._view, self.request_id)
        self.span.inject(metadata)
        begin = self._transport.channel().unary_stream(
            self._method.path,
            request_serializer=self._method.request.SerializeToString,
            response_deserializer=self._method.response.FromString,
        )
        try:
            call = self._transport.invoke(lambda: begin(self._request, timeout=timeout, metadata=tuple(metadata)))
            self._call = call
            if self._cancelled.is_set():
                call.cancel()
            self._first = next(call)
        except StopIteration:
            self._ended = True
        except grpc.RpcError as error:
            return self._failure(error, headers_seen=False)
        return None

    def _failure(self, error: grpc.RpcError, *, headers_seen: bool) -> Failure:
        """Convert what the call raised; our own end of it gets words that say so."""
        failure = failure_of(error, request_id=self.request_id, headers_seen=headers_seen, tls=self._transport.tls)
        if failure.error.code == "CANCELLED" and (self._cancelled.is_set() or self._transport.closed):
            text = "the client was closed" if self._transport.closed else "the call was cancelled"
            return Failure(error=Cancelled(text, request_id=self.request_id), headers_seen=True)
        return failure

    def read(self) -> R | None:
        """Wait for the next response; None at the end of the stream.

        Raises:
            LoramuxError: The call failed.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        if self._ended:
            return None
        try:
            message: R = next(self._call)
        except StopIteration:
            self._ended = True
            self.span.end()
            return None
        except grpc.RpcError as error:
            self._ended = True
            failure = self._failure(error, headers_seen=True)
            self.span.end(failure.error)
        else:
            return message
        raise failure.error

    def cancel(self) -> None:
        """End the call; nothing happens if it has ended."""
        self._cancelled.set()
        call = self._call
        if call is not None:
            call.cancel()
        self.span.end()
