"""The fake server: a gRPC server on a loop of its own, in a thread of this process."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.message import Message

from loramux import _methods as methods
from loramux._methods import Method
from loramux.testing._adapter_calls import AdapterCalls
from loramux.testing._generation_calls import GenerationCalls
from loramux.testing._registry import Registry
from loramux.testing._script import FakeError, RecordedCall, Reply
from loramux.v1 import adapter_pb2

Unary = Callable[[str, Any], Awaitable[Any]]
Stream = Callable[[str, Any], AsyncIterator[Any]]


class FakeServer:
    """A server for tests; safe to script from any thread.

    Args:
        token: Token that calls must carry; None takes any.
        tenant: Tenant of calls that name none.

    Attributes:
        calls: Every call, in order of arrival.
    """

    def __init__(self, *, token: str | None = None, tenant: str = "default") -> None:
        self._token = token
        self._tenant = tenant
        self._registry = Registry()
        self._generation = GenerationCalls(self._registry)
        self._adapters = AdapterCalls(self._registry)
        self._failures: defaultdict[str, deque[FakeError]] = defaultdict(deque)
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._port = 0
        self._failure: BaseException | None = None
        self.calls: list[RecordedCall] = []

    @property
    def address(self) -> str:
        """`host:port` of the running server."""
        if not self._port:
            raise RuntimeError("the server is not running: use it as a context manager")
        return f"127.0.0.1:{self._port}"

    def reply(self, *replies: Reply) -> None:
        """Script the answers to the next generations, in order; items of a batch count one by one."""
        self._generation.replies.extend(replies)

    def fail(self, method: str, *errors: FakeError) -> None:
        """Script failures of the next calls of a method, one each, before anything is done.

        Args:
            method: Name of the method, for example `Generate`.
            *errors: The failures, in order.
        """
        self._failures[method].extend(errors)

    def break_upload(self, after_bytes: int) -> None:
        """Script one break of an upload, once so many bytes are committed."""
        self._adapters.break_upload_at = after_bytes

    def calls_of(self, method: str) -> list[RecordedCall]:
        """Return the calls of one method."""
        return [call for call in list(self.calls) if call.method == method]

    def add_adapter(self, name: str, *, content: str = "", tenant: str | None = None, promote: bool = True) -> str:
        """Add an adapter version.

        Args:
            name: Name of the adapter, created if needed.
            content: What the version's digest is made of; another content is another version.
            tenant: Its tenant; None takes the server's default.
            promote: Whether the version serves at once.

        Returns:
            Full name of the version.
        """
        owner = self._tenant if tenant is None else tenant
        digest = hashlib.sha256(f"{owner}/{name}/{content}".encode()).hexdigest()

        def add() -> str:
            version = self._registry.put_version(owner, name, digest, [], {})
            if promote:
                adapter = self._registry.adapter(owner, name)
                self._registry.set_traffic(adapter, [adapter_pb2.TrafficTarget(version=version.name)])
                self._registry.changed(adapter.name)
            return version.name

        return self._on_loop(add)

    def _on_loop(self, work: Callable[[], str]) -> str:
        """Run `work` where the handlers run."""
        if self._loop is None:
            raise RuntimeError("the server is not running: use it as a context manager")

        async def run() -> str:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def __enter__(self) -> Self:
        """Start it."""
        self._thread = threading.Thread(target=self._run, name="loramux-fake-server", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise RuntimeError("the fake server did not start") from self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it; running calls are cancelled."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join()
        self._port = 0

    def _run(self) -> None:
        """Run the loop of the server."""
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  re-raised in __enter__
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        """Serve until told to stop."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(tuple(self._handlers()))
        self._port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._ready.set()
        try:
            await self._stop.wait()
        finally:
            await server.stop(None)
            self._loop = None

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        """Return the handlers of all services."""
        generation, adapters = self._generation, self._adapters
        unary: list[tuple[Method[Any, Any], Unary]] = [
            (methods.TOKENIZE, generation.tokenize),
            (methods.DETOKENIZE, generation.detokenize),
            (methods.CANCEL_GENERATION, generation.cancel),
            (methods.GET_MODEL, generation.model),
            (methods.GET_STATUS, generation.status),
            (methods.START_UPLOAD, adapters.start),
            (methods.GET_UPLOAD, adapters.get_upload),
            (methods.FINISH_UPLOAD, adapters.finish),
            (methods.GET_ADAPTER, adapters.get),
            (methods.LIST_ADAPTERS, adapters.list),
            (methods.GET_VERSION, adapters.get_version),
            (methods.LIST_VERSIONS, adapters.list_versions),
            (methods.UPDATE_ADAPTER, adapters.update),
            (methods.DELETE_ADAPTER, adapters.delete),
            (methods.DELETE_VERSION, adapters.delete_version),
            (methods.PRELOAD_ADAPTER, adapters.preload),
            (methods.UNLOAD_ADAPTER, adapters.unload),
            (methods.CREATE_GRANT, adapters.create_grant),
            (methods.LIST_GRANTS, adapters.list_grants),
            (methods.DELETE_GRANT, adapters.delete_grant),
        ]
        streams: list[tuple[Method[Any, Any], Stream]] = [
            (methods.GENERATE, generation.generate),
            (methods.BATCH_GENERATE, generation.batch),
            (methods.WATCH_ADAPTERS, adapters.watch),
        ]
        services: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for method, behaviour in unary:
            services[method.service][method.name] = grpc.unary_unary_rpc_method_handler(
                self._unary(method, behaviour), method.request.FromString, method.response.SerializeToString
            )
        for method, stream in streams:
            services[method.service][method.name] = grpc.unary_stream_rpc_method_handler(
                self._stream(method, stream), method.request.FromString, method.response.SerializeToString
            )
        write = methods.WRITE_UPLOAD
        services[write.service][write.name] = grpc.stream_unary_rpc_method_handler(
            self._unary(write, adapters.write), write.request.FromString, write.response.SerializeToString
        )
        return [grpc.method_handlers_generic_handler(f"loramux.v1.{name}", table) for name, table in services.items()]

    def _unary(self, method: Method[Any, Any], behaviour: Unary) -> Any:
        """Wrap a handler with one response."""

        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            call = self._record(method, request, context)
            call.cancelled = True
            try:
                answer = await behaviour(self._admit(call), request)
                call.cancelled = False
                return answer
            except FakeError as error:
                call.cancelled = False
                await _abort(context, error)
            finally:
                call.ended.set()

        return handle

    def _stream(self, method: Method[Any, Any], behaviour: Stream) -> Any:
        """Wrap a handler with many responses."""

        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            call = self._record(method, request, context)
            call.cancelled = True
            answers: Any = None
            try:
                answers = behaviour(self._admit(call), request)
                async for answer in answers:
                    yield answer
                call.cancelled = False
            except FakeError as error:
                call.cancelled = False
                await _abort(context, error)
            finally:
                if answers is not None:
                    await answers.aclose()
                call.ended.set()

        return handle

    def _record(
        self, method: Method[Any, Any], request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> RecordedCall:
        """Note a call."""
        metadata = {
            key: value if isinstance(value, str) else value.decode("latin-1")
            for key, value in context.invocation_metadata() or ()
        }
        call = RecordedCall(
            method=method.name,
            metadata=metadata,
            request=request if isinstance(request, Message) else None,
            time_remaining=context.time_remaining(),
        )
        self.calls.append(call)
        return call

    def _admit(self, call: RecordedCall) -> str:
        """Return the tenant of a call, or refuse it."""
        if self._failures[call.method]:
            raise self._failures[call.method].popleft()
        if self._token is not None and call.metadata.get("authorization") != f"Bearer {self._token}":
            raise FakeError("UNAUTHENTICATED", "UNAUTHENTICATED", "the credential is not valid")
        return call.metadata.get("x-loramux-tenant", self._tenant)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: FakeError) -> NoReturn:
    """End a call with a scripted failure."""
    if error.headers_first:
        await context.send_initial_metadata((("x-loramux-replica", "fake-0"),))
    await context.abort(grpc.StatusCode[error.code], error.message, error.trailers())
    raise AssertionError("abort does not return")
