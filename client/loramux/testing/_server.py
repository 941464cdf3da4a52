"""The fake server: gRPC's threads on the outside, one event loop for the state, all in this process."""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
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
Stream = Callable[[str, Any], AsyncGenerator[Any, None]]

# Calls at a time; more wait in gRPC.
MAX_CALLS = 256
HEADERS_LEAD = 0.02
_END = object()


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
        self._started = False
        self._port = 0
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
        if not self._port:
            raise RuntimeError("the server is not running: use it as a context manager")

        async def run() -> str:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            RuntimeError: It has been started before.
        """
        if self._started:
            raise RuntimeError("a fake server is started once; make a new one")
        self._started = True
        # gRPC's threads and a plain loop: an asyncio server of gRPC would share its poller with the client under test.
        self._pool = ThreadPoolExecutor(max_workers=MAX_CALLS, thread_name_prefix="loramux-fake")
        self._server = grpc.server(self._pool)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="loramux-fake-loop", daemon=True)
        self._thread.start()
        self._server.add_generic_rpc_handlers(tuple(self._handlers()))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it; running calls are cancelled."""
        self._port = 0
        self._server.stop(None).wait()
        # The threads first: a call that was accepted but not begun still hands its handler to the loop.
        self._pool.shutdown()
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_tasks(self) -> None:
        """Wait until the handlers of cancelled calls have cleaned up."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()

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
            (methods.GET_USAGE, adapters.usage),
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

        async def answers(tenant: str, request: Any) -> AsyncGenerator[Any, None]:
            yield await behaviour(tenant, request)

        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            answer = None
            for answer in self._run(method, answers, request, context):  # noqa: B007  the last one is the answer
                pass
            return answer

        return handle

    def _stream(self, method: Method[Any, Any], behaviour: Stream) -> Any:
        """Wrap a handler with many responses."""
        return lambda request, context: self._run(method, behaviour, request, context)

    def _run(
        self, method: Method[Any, Any], behaviour: Stream, request: Any, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """Run a handler on the loop and pass its answers to gRPC's thread."""
        call = self._record(method, request, context)
        call.cancelled = True
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pump = asyncio.run_coroutine_threadsafe(self._pump(call, behaviour, request, answers), self._loop)

        def ended(_: Future[None]) -> None:
            # Here and not in the pump: one that is cancelled before it has begun never runs.
            answers.put(_END)
            call.ended.set()

        def stop() -> None:
            pump.cancel()

        pump.add_done_callback(ended)
        if not context.add_callback(stop):
            stop()
        while (answer := answers.get()) is not _END:
            if isinstance(answer, FakeError):
                _abort(context, answer)
            yield answer

    async def _pump(self, call: RecordedCall, behaviour: Stream, request: Any, answers: queue.SimpleQueue[Any]) -> None:
        """Run a handler to its end, or until the call is cancelled."""
        try:
            if call.request is None:
                request = _requests(request)
            async with aclosing(behaviour(self._admit(call), request)) as events:
                async for event in events:
                    answers.put(event)
            call.cancelled = False
        except FakeError as error:
            call.cancelled = False
            answers.put(error)
        except Exception as error:
            answers.put(FakeError("INTERNAL", "", f"the fake server failed: {error!r}"))
            raise

    def _record(self, method: Method[Any, Any], request: Any, context: grpc.ServicerContext) -> RecordedCall:
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
        wanted = call.metadata.get("min_revision", "0")
        if int(wanted) > self._registry.revision:
            message = f"min_revision is {wanted}, and this replica has seen revision {self._registry.revision}"
            raise FakeError("UNAVAILABLE", "STORE_UNAVAILABLE", message, retry_after=1.0)
        return call.metadata.get("x-loramux-tenant", self._tenant)


async def _requests(messages: Iterator[Any]) -> AsyncIterator[Any]:
    """Read a stream of requests, which blocks, in threads."""
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message


def _abort(context: grpc.ServicerContext, error: FakeError) -> NoReturn:
    """End a call with a scripted failure."""
    if error.headers_first:
        context.send_initial_metadata((("x-loramux-replica", "fake-0"),))
        # Clients that get headers and status in one piece may not see the headers.
        time.sleep(HEADERS_LEAD)
    context.set_trailing_metadata(error.trailers())
    context.abort(grpc.StatusCode[error.code], error.message)
    raise AssertionError("abort does not return")
