"""Batches: windows, groups, failures of items and of calls, closing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from loramux import (
    AdapterNotFound,
    AsyncClient,
    BatchRequest,
    Client,
    InvalidRequest,
    PermissionDenied,
    SamplingParams,
    StreamInterrupted,
    Unavailable,
)
from loramux._batch import GroupBuilder, group_size
from loramux.testing import FakeError, FakeServer, Reply


class TestGroups:
    @pytest.mark.parametrize(("window", "size"), [(1, 1), (3, 1), (8, 2), (256, 64), (4096, 1024)])
    def test_size(self, window: int, size: int) -> None:
        assert group_size(window) == size

    @pytest.mark.parametrize("window", [0, -1, 4097, 2.5, True])
    def test_windows_that_are_none(self, window: Any) -> None:
        with pytest.raises(InvalidRequest, match="window"):
            group_size(window)

    def test_a_group_fits_into_a_message(self) -> None:
        builder = GroupBuilder(64, adapter=None)
        big = "x" * (1024 * 1024)
        added = 0
        while not builder.full:
            assert builder.add(big) is None
            added += 1
        group = builder.take()
        assert sum(item.ByteSize() for item in group) < 4 * 1024 * 1024
        assert len(group) == added - 1
        assert [item.item_id for item in builder.take()] == [str(added - 1)]
        assert builder.items == 0

    def test_ids_are_free_again_once_answered(self) -> None:
        builder = GroupBuilder(4, adapter=None)
        assert builder.add(BatchRequest("a", item_id="x")) is None
        refused = builder.add(BatchRequest("b", item_id="x"))
        assert refused is not None and isinstance(refused.error, InvalidRequest)
        builder.answered("x")
        assert builder.add(BatchRequest("c", item_id="x")) is None


class Source:
    """Counts what was pulled."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.pulled = 0

    def __iter__(self) -> Iterator[str]:
        for index in range(self.items):
            self.pulled += 1
            yield f"prompt {index}"

    async def __aiter__(self) -> AsyncIterator[str]:
        for prompt in iter(self):
            await asyncio.sleep(0)
            yield prompt


class AsyncOnly:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __aiter__(self) -> AsyncIterator[str]:
        return self.source.__aiter__()


class PlainOnly:
    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)


def expected(count: int) -> dict[str, str]:
    return {str(index): f"prompt {index}" for index in range(count)}


class TestSync:
    def test_every_item_is_answered_once_and_the_window_holds(self, server: FakeServer, client: Client) -> None:
        source = Source(100)
        answers: list[tuple[str, str]] = []
        for item in client.batch_generate(PlainOnly(source), window=8):
            answers.append((item.item_id, item.unwrap().text))
            assert source.pulled <= len(answers) + 8
        assert len(answers) == 100
        assert dict(answers) == expected(100)
        assert max(len(call.request.items) for call in server.calls_of("BatchGenerate")) == 2

    def test_nothing_to_do(self, server: FakeServer, client: Client) -> None:
        assert list(client.batch_generate([])) == []
        assert not server.calls

    def test_an_item_fails_alone(self, server: FakeServer, client: Client) -> None:
        server.add_adapter("bot")
        items = {
            item.item_id: item
            for item in client.with_adapter("bot").batch_generate(
                [
                    BatchRequest("a", item_id="good"),
                    BatchRequest("b", item_id="foreign", adapter="nope"),
                    BatchRequest("c", item_id="hot", sampling=SamplingParams(temperature=11)),
                    BatchRequest("", item_id="empty"),
                    BatchRequest("d", item_id="good"),
                    BatchRequest("e", item_id="pair", sampling=SamplingParams(n=2)),
                ]
            )
            if item.error is None or item.item_id != "good"
        }
        assert items["good"].unwrap().text == "a"
        assert items["good"].unwrap().adapter_version is not None
        assert isinstance(items["foreign"].error, AdapterNotFound)
        assert isinstance(items["hot"].error, InvalidRequest)
        assert items["hot"].error.field_violations[0].field == "sampling.temperature"
        assert isinstance(items["empty"].error, InvalidRequest)
        assert len(items["pair"].unwrap().outputs) == 2
        with pytest.raises(AdapterNotFound):
            items["foreign"].unwrap()

    def test_a_call_that_breaks_fails_its_items_only(self, server: FakeServer, client: Client) -> None:
        server.fail("BatchGenerate", FakeError("INTERNAL", headers_first=True))
        items = list(client.batch_generate(Source(16), window=8))
        failed = [item for item in items if item.error is not None]
        assert len(items) == 16
        assert len(failed) == 2
        assert len({id(item.error) for item in failed}) == 2

    def test_an_item_cut_off_in_the_middle_has_what_arrived(self, server: FakeServer, client: Client) -> None:
        server.reply(Reply(["Hel"], truncated=True))
        [item] = client.batch_generate(["a"])
        assert isinstance(item.error, StreamInterrupted)
        assert item.error.partial == "Hel"

    def test_a_refusal_that_meets_all_raises(self, server: FakeServer, client: Client) -> None:
        server.fail("BatchGenerate", *[FakeError("PERMISSION_DENIED", "PERMISSION_DENIED")] * 4)
        with pytest.raises(PermissionDenied):
            list(client.batch_generate(Source(16), window=8))

    def test_closing_ends_the_calls(self, server: FakeServer, client: Client) -> None:
        server.reply(*[Reply(["x"]), *[Reply(["x"], hang=True)] * 8])
        answers = client.batch_generate(Source(100), window=8)
        next(answers)
        answers.close()
        for call in server.calls_of("BatchGenerate"):
            assert call.ended.wait(10)
        assert any(call.cancelled for call in server.calls_of("BatchGenerate"))

    def test_an_error_of_the_source_is_the_callers(self, client: Client) -> None:
        def source() -> Iterator[str]:
            yield "a"
            raise KeyError("of the source")

        with pytest.raises(KeyError, match="of the source"):
            list(client.batch_generate(source()))

    def test_retried_before_headers(self, server: FakeServer, client: Client) -> None:
        server.fail("BatchGenerate", FakeError("UNAVAILABLE", pushback_ms=1))
        assert [item.unwrap().text for item in client.batch_generate(["a"])] == ["a"]
        assert len(server.calls) == 2

    def test_options_reach_the_server(self, server: FakeServer, client: Client) -> None:
        list(client.batch_generate([BatchRequest("a", timeout=1.5)], pin_versions=True, timeout=30))
        [call] = server.calls
        assert call.request.pin_versions
        assert call.request.items[0].timeout.seconds == 1
        assert call.time_remaining is not None and call.time_remaining < 35


class TestAsync:
    @pytest.mark.parametrize("kind", [PlainOnly, AsyncOnly])
    async def test_every_item_is_answered_once_and_the_window_holds(
        self, server: FakeServer, async_client: AsyncClient, kind: type[PlainOnly] | type[AsyncOnly]
    ) -> None:
        source = Source(100)
        answers: list[tuple[str, str]] = []
        async for item in async_client.batch_generate(kind(source), window=8):
            answers.append((item.item_id, item.unwrap().text))
            assert source.pulled <= len(answers) + 8
        assert len(answers) == 100
        assert dict(answers) == expected(100)

    async def test_a_source_may_wait_for_answers(self, async_client: AsyncClient) -> None:
        answered = asyncio.Event()

        async def source() -> AsyncIterator[str]:
            yield "first"
            await answered.wait()
            yield "second"

        texts = []
        async for item in async_client.batch_generate(source()):
            texts.append(item.unwrap().text)
            answered.set()
        assert texts == ["first", "second"]

    async def test_refused_items_and_good_ones(self, async_client: AsyncClient) -> None:
        requests = ["a", "", BatchRequest("b", item_id="0"), "c", *[""] * 20, "z"]
        items = [item async for item in async_client.batch_generate(requests, window=4)]
        assert len(items) == len(requests)
        good = sorted(item.unwrap().text for item in items if item.error is None)
        assert good in (["a", "b", "c", "z"], ["a", "c", "z"])

    async def test_a_call_that_breaks_fails_its_items_only(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.fail("BatchGenerate", FakeError("UNAVAILABLE", headers_first=True))
        items = [item async for item in async_client.batch_generate(Source(16), window=8)]
        assert len(items) == 16
        assert [type(item.error) for item in items if item.error is not None] == [Unavailable, Unavailable]

    async def test_a_refusal_that_meets_all_raises(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.fail("BatchGenerate", *[FakeError("PERMISSION_DENIED", "PERMISSION_DENIED")] * 4)
        with pytest.raises(PermissionDenied):
            _ = [item async for item in async_client.batch_generate(Source(16), window=8)]

    async def test_an_error_of_the_source_is_the_callers(self, async_client: AsyncClient) -> None:
        async def source() -> AsyncIterator[str]:
            yield "a"
            raise KeyError("of the source")

        with pytest.raises(KeyError, match="of the source"):
            _ = [item async for item in async_client.batch_generate(source())]

    async def test_closing_ends_the_calls(self, server: FakeServer, async_client: AsyncClient) -> None:
        server.reply(*[Reply(["x"]), *[Reply(["x"], hang=True)] * 8])
        async with aclosing(async_client.batch_generate(Source(100), window=8)) as answers:
            await anext(answers)
        for call in server.calls_of("BatchGenerate"):
            assert await asyncio.to_thread(call.ended.wait, 10)
        assert any(call.cancelled for call in server.calls_of("BatchGenerate"))
