"""Life of a stream in both clients: what is sent when, who ends it, what a reader sees."""

import asyncio
import threading

import grpc
import pytest

from loramux import (
    AsyncClient,
    Client,
    ClientStateError,
    DeadlineExceeded,
    FinishReason,
    Overloaded,
    StreamInterrupted,
)
from loramux.testing import FakeError, FakeServer, RecordedCall, Reply

HANG = Reply(["Hel", "lo"], hang=True)


def only_call(server: FakeServer) -> RecordedCall:
    [call] = server.calls_of("Generate")
    assert call.ended.wait(10)
    return call


async def ended(server: FakeServer) -> RecordedCall:
    return await asyncio.to_thread(only_call, server)


class TestSync:
    def test_started_deltas_finished_usage(self, server: FakeServer, client: Client) -> None:
        version = server.add_adapter("bot")
        server.reply(Reply(["Hel", "lo"]))
        with client.generate("Hi", adapter="bot", temperature=0) as stream:
            assert stream.started.adapter_version == version
            assert "".join(delta.text for delta in stream) == "Hello"
            assert stream.finished.reason is FinishReason.STOP
            assert stream.usage.output_tokens == 5
            assert stream.result().text == "Hello"
        assert stream.result().usage == stream.usage
        assert not only_call(server).cancelled

    def test_nothing_is_sent_before_the_block(self, server: FakeServer, client: Client) -> None:
        client.generate("Hi")
        client.model()
        assert not server.calls_of("Generate")

    def test_iterating_outside_of_the_block_raises(self, server: FakeServer, client: Client) -> None:
        stream = client.generate("Hi")
        for use in (lambda: iter(stream), lambda: next(stream)):
            with pytest.raises(ClientStateError, match="with client.generate"):
                use()
        with pytest.raises(ClientStateError, match="enter its block"):
            _ = stream.started
        assert not server.calls
        with stream:
            pass
        with pytest.raises(ClientStateError, match="has been left"):
            next(stream)
        with pytest.raises(ClientStateError, match="has been left"):
            stream.result()
        with pytest.raises(ClientStateError, match="entered once"):
            stream.__enter__()

    def test_views_of_the_end_raise_before_it(self, server: FakeServer, client: Client) -> None:
        server.reply(HANG)
        with client.generate("Hi") as stream:
            for name in ("finished", "usage"):
                with pytest.raises(ClientStateError, match="end"):
                    getattr(stream, name)
            assert stream.finished_all == ()

    def test_several_sequences(self, client: Client) -> None:
        with client.generate("Hi", n=2) as stream:
            assert sorted(delta.index for delta in stream) == [0, 1]
            assert [end.index for end in stream.finished_all] == [0, 1]
            with pytest.raises(ClientStateError, match="finished_all"):
                _ = stream.finished

    @pytest.mark.parametrize("how", ["break", "exception", "leave", "cancel"])
    def test_leaving_the_block_frees_the_call(self, server: FakeServer, client: Client, how: str) -> None:
        server.reply(HANG)

        def use() -> None:
            with client.generate("Hi") as stream:
                if how == "leave":
                    return
                for _ in stream:
                    if how == "exception":
                        raise KeyError("of the caller")
                    if how == "cancel":
                        stream.cancel()
                        break
                    break

        if how == "exception":
            with pytest.raises(KeyError):
                use()
        else:
            use()
        assert only_call(server).cancelled

    def test_cancel_from_another_thread_interrupts_the_reader(self, server: FakeServer, client: Client) -> None:
        server.reply(HANG)
        with client.generate("Hi") as stream:
            assert next(stream).text == "Hel"
            timer = threading.Timer(0.05, stream.cancel)
            timer.start()
            with pytest.raises(StreamInterrupted) as caught:
                for _ in stream:
                    pass
            timer.join()
        assert (caught.value.code, caught.value.partial) == ("CANCELLED", "Hello")
        assert caught.value.message == "the stream broke after 5 tokens: the call was cancelled"
        assert only_call(server).cancelled

    def test_cancel_before_the_block_keeps_it_from_being_sent(self, server: FakeServer, client: Client) -> None:
        stream = client.generate("Hi")
        stream.cancel()
        with pytest.raises(ClientStateError):
            stream.result()
        assert not server.calls

    def test_cancel_by_id_ends_well(self, server: FakeServer, client: Client) -> None:
        server.reply(HANG)
        with client.generate("Hi") as stream:
            assert client.cancel(stream.started.generation_id)
            assert stream.result().finish_reason is FinishReason.CANCELLED
            assert not client.cancel(stream.started.generation_id)

    def test_a_stream_without_an_end_is_an_error(self, server: FakeServer, client: Client) -> None:
        server.reply(Reply(["Hel"], truncated=True))
        with pytest.raises(StreamInterrupted) as caught:
            client.generate("Hi").result()
        error = caught.value
        assert (error.partial, error.tokens_received) == ("Hel", 3)
        assert error.generation_id
        assert error.outputs[0].finish_reason is FinishReason.INTERRUPTED

    def test_an_error_inside_the_stream_is_not_retried(self, server: FakeServer, client: Client) -> None:
        server.reply(Reply(["Hel"], error=FakeError("UNAVAILABLE", "ENGINE_UNAVAILABLE", "the engine died")))
        with client.generate("Hi") as stream:
            assert next(stream).text == "Hel"
            for _ in range(2):
                with pytest.raises(StreamInterrupted) as caught:
                    next(stream)
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
        assert len(server.calls_of("Generate")) == 1

    def test_a_verdict_inside_the_stream_keeps_its_class(self, server: FakeServer, client: Client) -> None:
        server.reply(Reply(["Hel"], error=FakeError("RESOURCE_EXHAUSTED", "SLOW_READER")))
        with pytest.raises(Overloaded) as caught:
            client.generate("Hi").result()
        assert caught.value.generation_id

    def test_deadline(self, server: FakeServer, client: Client) -> None:
        server.reply(HANG)
        with pytest.raises(DeadlineExceeded) as caught:
            client.generate("Hi", timeout=0.2).result()
        assert isinstance(caught.value, TimeoutError)
        call = only_call(server)
        assert call.cancelled
        assert call.time_remaining is not None and call.time_remaining < 5

    def test_no_grpc_exception_hangs_on_an_error(self, server: FakeServer, client: Client) -> None:
        server.fail("Generate", FakeError("INTERNAL"))
        with pytest.raises(Exception) as caught:
            client.generate("Hi").result()
        chain: list[BaseException] = []
        error: BaseException | None = caught.value
        while error is not None:
            chain.append(error)
            error = error.__cause__ or error.__context__
        assert not any(isinstance(link, grpc.RpcError) for link in chain)

    def test_closing_the_client_ends_a_stream(self, server: FakeServer) -> None:
        server.reply(HANG)
        client = Client(server.address)
        with client.generate("Hi") as stream:
            next(stream)
            client.close()
            with pytest.raises(StreamInterrupted, match="the client was closed"):
                for _ in stream:
                    pass
        with pytest.raises(ClientStateError, match="closed"):
            client.model()

    def test_reading_outside_of_the_block_says_how(self, server: FakeServer, client: Client) -> None:
        with pytest.raises(ClientStateError, match="inside of `with client"):
            next(iter(client.generate("Hi")))
        assert server.calls == []


class TestAsync:
    async def test_reading_outside_of_the_block_says_how(self, server: FakeServer, async_client: AsyncClient) -> None:
        with pytest.raises(ClientStateError, match="inside of `async with client"):
            await anext(aiter(async_client.generate("Hi")))
        assert server.calls == []

    async def test_started_deltas_finished_usage(self, server: FakeServer, async_client: AsyncClient) -> None:
        version = server.add_adapter("bot")
        server.reply(Reply(["Hel", "lo"]))
        async with async_client.generate("Hi", adapter="bot", temperature=0) as stream:
            assert stream.started.adapter_version == version
            assert "".join([delta.text async for delta in stream]) == "Hello"
            assert stream.finished.reason is FinishReason.STOP
            assert stream.usage.output_tokens == 5
            assert (await stream.result()).text == "Hello"
        assert (await stream.result()).usage == stream.usage
        assert not (await ended(server)).cancelled

    async def test_iterating_outside_of_the_block_raises(self, server: FakeServer, async_client: AsyncClient) -> None:
        stream = async_client.generate("Hi")
        with pytest.raises(ClientStateError, match="with client.generate"):
            aiter(stream)
        with pytest.raises(ClientStateError, match="with client.generate"):
            await anext(stream)
        assert not server.calls
        async with stream:
            pass
        with pytest.raises(ClientStateError, match="has been left"):
            await anext(stream)
        with pytest.raises(ClientStateError, match="entered once"):
            await stream.__aenter__()

    @pytest.mark.parametrize("how", ["break", "exception", "leave", "cancel"])
    async def test_leaving_the_block_frees_the_call(
        self, server: FakeServer, async_client: AsyncClient, how: str
    ) -> None:
        server.reply(HANG)

        async def use() -> None:
            async with async_client.generate("Hi") as stream:
                if how == "leave":
                    return
                async for _ in stream:
                    if how == "exception":
                        raise KeyError("of the caller")
                    if how == "cancel":
                        stream.cancel()
                        break
                    break

        if how == "exception":
            with pytest.raises(KeyError):
                await use()
        else:
            await use()
        assert (await ended(server)).cancelled

    async def test_cancel_from_another_task_interrupts_the_reader(
        self, server: FakeServer, async_client: AsyncClient
    ) -> None:
        server.reply(HANG)
        async with async_client.generate("Hi") as stream:
            assert (await anext(stream)).text == "Hel"
            asyncio.get_running_loop().call_later(0.05, stream.cancel)
            with pytest.raises(StreamInterrupted) as caught:
                async for _ in stream:
                    pass
        assert (caught.value.code, caught.value.partial) == ("CANCELLED", "Hello")
        assert caught.value.message == "the stream broke after 5 tokens: the call was cancelled"
        assert (await ended(server)).cancelled

    async def test_a_cancelled_task_gets_cancelled_error(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.reply(HANG)
        reading = asyncio.Event()

        async def use() -> None:
            async with async_client.generate("Hi") as stream:
                async for _ in stream:
                    reading.set()

        task = asyncio.create_task(use())
        await reading.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await ended(server)).cancelled

    async def test_asyncio_timeout_works_as_everywhere(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.reply(HANG)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await async_client.generate("Hi").result()
        assert not isinstance(caught.value, DeadlineExceeded)
        assert (await ended(server)).cancelled

    async def test_deadline(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.reply(HANG)
        with pytest.raises(DeadlineExceeded):
            await async_client.generate("Hi", timeout=0.2).result()
        assert (await ended(server)).cancelled

    async def test_a_stream_without_an_end_is_an_error(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.reply(Reply(["Hel"], truncated=True))
        with pytest.raises(StreamInterrupted) as caught:
            await async_client.generate("Hi").result()
        assert (caught.value.partial, caught.value.tokens_received) == ("Hel", 3)

    async def test_an_error_inside_the_stream_is_not_retried(
        self, server: FakeServer, async_client: AsyncClient
    ) -> None:
        server.reply(Reply(["Hel"], error=FakeError("UNAVAILABLE", "ENGINE_UNAVAILABLE")))
        async with async_client.generate("Hi") as stream:
            await anext(stream)
            for _ in range(2):
                with pytest.raises(StreamInterrupted) as caught:
                    await anext(stream)
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
        assert len(server.calls_of("Generate")) == 1

    async def test_cancel_by_id_ends_well(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.reply(HANG)
        async with async_client.generate("Hi") as stream:
            assert await async_client.cancel(stream.started.generation_id)
            assert (await stream.result()).finish_reason is FinishReason.CANCELLED

    async def test_closing_the_client_ends_a_stream(self, server: FakeServer) -> None:
        server.reply(HANG)
        client = AsyncClient(server.address)
        async with client.generate("Hi") as stream:
            await anext(stream)
            await client.close()
            with pytest.raises(StreamInterrupted, match="the client was closed"):
                async for _ in stream:
                    pass
        with pytest.raises(ClientStateError, match="closed"):
            await client.model()

    async def test_many_streams_at_once(self, async_client: AsyncClient) -> None:
        async def run(index: int) -> str:
            return (await async_client.generate(f"prompt {index}").result()).text

        texts = await asyncio.gather(*(run(index) for index in range(50)))
        assert texts == [f"prompt {index}" for index in range(50)]


async def test_no_task_is_left_behind(server: FakeServer) -> None:
    server.reply(HANG, HANG)
    before = asyncio.all_tasks()
    async with AsyncClient(server.address) as client:
        async with client.generate("Hi") as stream:
            await anext(stream)
        async with client.generate("Hi") as stream:
            pass
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    if left:
        await asyncio.wait(left, timeout=5)
    assert all(task.done() for task in left)
