"""Metadata, tokens, misuse and threads, over a real channel."""

import asyncio
import copy as copying
import os
import pickle  # noqa: TID251  shown to be refused
import threading

import pytest

from loramux import AsyncClient, Cancelled, Client, ClientStateError, InvalidRequest, NotAuthenticated, NotServedYet
from loramux._clock import Clock
from loramux._transport import Transport
from loramux.testing import FakeError, FakeServer
from tests.support.client_clock import FakeClock

AWAY = FakeError("UNAVAILABLE")


class TestMetadata:
    async def test_reaches_unary_calls_and_streams(self, server: FakeServer) -> None:
        with Client(server.address, token="secret", tenant="acme") as client:
            client.model()
            client.generate("Hi", request_id="mine").result()
            list(client.batch_generate(["Hi"]))
            with client.adapters.watch():
                pass
        async with AsyncClient(server.address, token="secret", tenant="acme") as async_client:
            await async_client.model()
            await async_client.generate("Hi").result()
            _ = [item async for item in async_client.batch_generate(["Hi"])]
            async with async_client.adapters.watch():
                pass
        assert len(server.calls) == 8
        for call in server.calls:
            assert call.metadata["authorization"] == "Bearer secret"
            assert call.metadata["x-loramux-tenant"] == "acme"
            assert call.metadata["x-request-id"]
            assert call.metadata["user-agent"].startswith("loramux-python/")
        assert server.calls[1].metadata["x-request-id"] == "mine"

    def test_min_revision(self, server: FakeServer, client: Client) -> None:
        for content in "abcd":  # two revisions each: the version and its traffic
            server.add_adapter("bot", content=content)
        client.with_min_revision(7).model()
        assert server.calls[0].metadata["min_revision"] == "7"

    def test_default_deadlines(self, server: FakeServer) -> None:
        with Client(server.address, timeout=30, generate_timeout=50) as client:
            client.model()
            client.generate("Hi").result()
            client.generate("Hi", timeout=float("inf")).result()
        times = [call.time_remaining for call in server.calls]
        assert times[0] is not None and 25 < times[0] < 35
        assert times[1] is not None and 45 < times[1] < 55
        assert times[2] is None or times[2] > 1e6


class TestTokens:
    def test_a_callable_is_asked_before_each_attempt(self, clock: FakeClock) -> None:
        tokens = iter(["old", "new"])
        with FakeServer(token="new") as server, Client(server.address, token=lambda: next(tokens)) as client:
            client._transport.clock = clock
            server.fail("GetModel", AWAY)
            client.model()
            sent = [call.metadata["authorization"] for call in server.calls]
        assert sent == ["Bearer old", "Bearer new"]

    async def test_a_coroutine_function_works_for_asyncio(self) -> None:
        async def token() -> str:
            await asyncio.sleep(0)
            return "t"

        with FakeServer(token="t") as server:
            async with AsyncClient(server.address, token=token) as client:
                assert (await client.model()).name == "fake"

    def test_what_a_callable_returns_is_checked(self, server: FakeServer) -> None:
        with Client(server.address, token=lambda: "two words") as client, pytest.raises(InvalidRequest, match="token"):
            client.model()

    def test_a_wrong_one(self) -> None:
        with FakeServer(token="right") as server, Client(server.address, token="wrong") as client:
            with pytest.raises(NotAuthenticated) as caught:
                client.model()
            assert caught.value.request_id == server.calls[0].metadata["x-request-id"]
            with pytest.raises(NotAuthenticated):
                next(iter(client.batch_generate(["a", "b"])))


class TestMisuse:
    def test_use_after_fork(self, server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        client.model()
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ClientStateError, match="fork"):
            client.model()
        with pytest.raises(ClientStateError, match="fork"):
            client.generate("Hi").result()
        monkeypatch.undo()
        assert client.model().name == "fake"

    async def test_use_after_fork_async(
        self, server: FakeServer, async_client: AsyncClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await async_client.model()
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ClientStateError, match="fork"):
            await async_client.model()

    def test_a_client_belongs_to_one_loop(self, server: FakeServer) -> None:
        client = AsyncClient(server.address)  # no loop runs here: the channel is made later

        async def use() -> str:
            return (await client.model()).name

        async def use_and_close() -> str:
            try:
                return await use()
            finally:
                await client.close()

        with asyncio.Runner() as first:
            assert first.run(use()) == "fake"
            with asyncio.Runner() as second, pytest.raises(ClientStateError, match="another event loop"):
                second.run(use())
            first.run(use_and_close())

    def test_closed(self, server: FakeServer) -> None:
        client = Client(server.address)
        client.for_tenant("acme").close()
        assert client.model().name == "fake"
        client.close()
        client.close()
        with pytest.raises(ClientStateError, match="closed"):
            client.for_tenant("acme").model()

    def test_close_and_first_call_at_once_leave_no_channel(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = Client(server.address)
        transport = client._transport
        monkeypatch.setattr(transport, "_lock", _ClosingLock(transport))
        with pytest.raises(ClientStateError, match="closed"):
            client.model()
        assert transport._channel is None

    @pytest.mark.parametrize("cls", [Client, AsyncClient])
    def test_repr_says_where_and_for_whom(self, cls: type[Client] | type[AsyncClient]) -> None:
        client = cls("localhost:50051", token="secret", tenant="acme")
        assert repr(client) == f"{cls.__name__}('localhost:50051', tenant='acme')"
        view = client.with_adapter("bot").with_min_revision(3)
        assert repr(view) == f"{cls.__name__}('localhost:50051', tenant='acme', adapter='bot', min_revision=3)"

    def test_repr_of_a_stream(self, server: FakeServer, client: Client) -> None:
        stream = client.generate("secret prompt")
        assert repr(stream) == "<GenerationStream new>"
        with stream:
            assert repr(stream) == f"<GenerationStream open {stream.started.generation_id}>"
        assert repr(stream).startswith("<GenerationStream left ")

    @pytest.mark.parametrize("cls", [Client, AsyncClient])
    def test_a_client_stays_in_its_process(self, cls: type[Client] | type[AsyncClient]) -> None:
        for copy in (pickle.dumps, copying.copy, copying.deepcopy):
            with pytest.raises(TypeError, match="make one in each process"):
                copy(cls("localhost:50051"))

    async def test_cancel_ends_the_wait_between_attempts(self, server: FakeServer) -> None:
        server.fail("Generate", FakeError("UNAVAILABLE", retry_after=20.0))
        clock = _SignallingClock()
        async with AsyncClient(server.address) as client:
            client._transport.clock = clock
            stream = client.generate("Hi")
            opening = asyncio.create_task(stream.__aenter__())
            async with asyncio.timeout(10):
                await clock.waiting.wait()
                stream.cancel()
                with pytest.raises(Cancelled):
                    await opening

    def test_a_method_that_the_server_does_not_have(self, server: FakeServer, client: Client) -> None:
        server.fail("GetTenantUsage", FakeError("UNIMPLEMENTED"))
        with pytest.raises(NotServedYet):
            list(client.adapters.usage())


class _SignallingClock(Clock):
    """Tells when a wait has begun."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()

    async def wait_async(self, event: asyncio.Event, seconds: float) -> bool:
        self.waiting.set()
        return await super().wait_async(event, seconds)


class _ClosingLock:
    """Somebody closes the client between the look at the channel and the lock."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._transport._closed = True

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class TestThreads:
    def test_one_client_many_threads(self, server: FakeServer) -> None:
        texts: dict[int, str] = {}
        with Client(server.address) as client:

            def run(index: int) -> None:
                view = client.for_tenant(f"t{index}")
                texts[index] = view.generate(f"prompt {index}").result().text

            threads = [threading.Thread(target=run, args=(index,)) for index in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert texts == {index: f"prompt {index}" for index in range(16)}
        tenants = {call.request.text: call.metadata["x-loramux-tenant"] for call in server.calls}
        assert tenants == {f"prompt {index}": f"t{index}" for index in range(16)}
