"""Attempts of a call, over a real channel and with a clock that never sleeps."""

import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from loramux import (
    AsyncClient,
    Client,
    Overloaded,
    QuotaExceeded,
    RetryPolicy,
    ServerError,
    StreamInterrupted,
    Unavailable,
)
from loramux.testing import FakeError, FakeServer
from tests.support.client_clock import FakeClock

AWAY = FakeError("UNAVAILABLE")


@pytest.fixture
def client(server: FakeServer, clock: FakeClock) -> Iterator[Client]:
    with Client(server.address) as open_client:
        open_client._transport.clock = clock
        yield open_client


@pytest.fixture
async def async_client(server: FakeServer, clock: FakeClock) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as open_client:
        open_client._transport.clock = clock
        yield open_client


class TestRetries:
    def test_before_headers(self, server: FakeServer, client: Client, clock: FakeClock) -> None:
        server.fail("Generate", AWAY, AWAY)
        assert client.generate("Hi").result().text == "Hi"
        assert clock.slept == pytest.approx([0.15, 0.3])
        calls = server.calls_of("Generate")
        assert len(calls) == 3
        assert len({call.metadata["x-request-id"] for call in calls}) == 1

    async def test_before_headers_async(self, server: FakeServer, async_client: AsyncClient, clock: FakeClock) -> None:
        server.fail("Generate", AWAY, AWAY)
        assert (await async_client.generate("Hi").result()).text == "Hi"
        assert clock.slept == pytest.approx([0.15, 0.3])

    def test_after_headers_never(self, server: FakeServer, client: Client, clock: FakeClock) -> None:
        server.fail("Generate", FakeError("UNAVAILABLE", "DRAINING", headers_first=True))
        with pytest.raises(Unavailable):
            client.generate("Hi").result()
        assert len(server.calls) == 1
        assert clock.slept == []

    async def test_after_headers_never_async(
        self, server: FakeServer, async_client: AsyncClient, clock: FakeClock
    ) -> None:
        server.fail("Generate", FakeError("UNAVAILABLE", "DRAINING", headers_first=True))
        with pytest.raises(Unavailable):
            await async_client.generate("Hi").result()
        assert len(server.calls) == 1
        assert clock.slept == []

    def test_pushback_is_obeyed(self, server: FakeServer, client: Client, clock: FakeClock) -> None:
        server.fail("Tokenize", FakeError("UNAVAILABLE", pushback_ms=2000))
        client.tokenize("x")
        assert clock.slept == pytest.approx([2.1])

    def test_negative_pushback_ends_it(self, server: FakeServer, client: Client, clock: FakeClock) -> None:
        server.fail("Tokenize", FakeError("UNAVAILABLE", pushback_ms=-1))
        with pytest.raises(Unavailable):
            client.tokenize("x")
        assert clock.slept == []

    async def test_pushback_async(self, server: FakeServer, async_client: AsyncClient, clock: FakeClock) -> None:
        server.fail("Tokenize", FakeError("UNAVAILABLE", pushback_ms=2000), FakeError("UNAVAILABLE", pushback_ms=-1))
        with pytest.raises(Unavailable):
            await async_client.tokenize("x")
        assert clock.slept == pytest.approx([2.1])

    def test_a_quota_is_waited_for_only_within_the_deadline(
        self, server: FakeServer, client: Client, clock: FakeClock
    ) -> None:
        quota = FakeError("RESOURCE_EXHAUSTED", "TENANT_QUOTA", retry_after=3.0)
        server.fail("Generate", quota)
        assert client.generate("Hi", timeout=60).result().text == "Hi"
        assert clock.slept == pytest.approx([3.15])
        server.fail("Generate", quota)
        with pytest.raises(QuotaExceeded) as caught:
            client.generate("Hi", timeout=2).result()
        assert caught.value.retry_after == 3.0
        assert len(clock.slept) == 1

    @pytest.mark.parametrize(
        ("error", "cls"),
        [
            (FakeError("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", retry_after=0.1), Overloaded),
            (FakeError("RESOURCE_EXHAUSTED"), Overloaded),
            (FakeError("RESOURCE_EXHAUSTED", "QUEUE_FULL"), Overloaded),
            (FakeError("INTERNAL", "INTERNAL"), ServerError),
            (FakeError("UNKNOWN"), ServerError),
        ],
    )
    def test_what_is_final(
        self, server: FakeServer, client: Client, clock: FakeClock, error: FakeError, cls: type[Exception]
    ) -> None:
        server.fail("Generate", error)
        with pytest.raises(cls):
            client.generate("Hi").result()
        assert len(server.calls) == 1
        assert clock.slept == []

    def test_attempts_are_bounded(self, server: FakeServer, client: Client) -> None:
        server.fail("Tokenize", *[AWAY] * 9)
        with pytest.raises(Unavailable):
            client.tokenize("x")
        assert len(server.calls) == 5

    def test_the_policy_can_switch_them_off(self, server: FakeServer) -> None:
        server.fail("Tokenize", AWAY)
        with Client(server.address, retry=RetryPolicy(max_attempts=1)) as client, pytest.raises(Unavailable):
            client.tokenize("x")
        assert len(server.calls) == 1

    def test_the_budget_is_shared_by_views(self, server: FakeServer, client: Client) -> None:
        server.fail("Tokenize", *[AWAY] * 200)
        for view in (client, client.for_tenant("acme"), client.with_adapter("bot")):
            for _ in range(10):
                with pytest.raises(Unavailable):
                    view.tokenize("x")
        # 49 failures leave more than half of 100 tokens; each of the 30 calls makes its first attempt all the same.
        assert 49 < len(server.calls) < 5 * 30
        before = len(server.calls)
        with pytest.raises(Unavailable):
            client.tokenize("x")
        assert len(server.calls) == before + 1

    def test_a_mutation_keeps_its_key(self, server: FakeServer, client: Client) -> None:
        version = server.add_adapter("bot", promote=False)
        server.fail("UpdateAdapter", AWAY, AWAY)
        client.adapters.promote("bot", version)
        client.adapters.promote("bot", version)
        keys = [call.request.idempotency_key for call in server.calls_of("UpdateAdapter")]
        assert len(keys) == 4
        assert keys[0] and keys[0] == keys[1] == keys[2] != keys[3]

    def test_nobody_listens(self, clock: FakeClock) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            with Client(address) as client:
                client._transport.clock = clock
                with pytest.raises(Unavailable):
                    client.generate("Hi").result()
        assert len(clock.slept) == 4


def test_a_server_that_goes_away(clock: FakeClock) -> None:
    from loramux.testing import Reply

    with FakeServer() as server:
        server.reply(Reply(["Hel"], hang=True))
        client = Client(server.address, retry=RetryPolicy(max_attempts=1))
        stream = client.generate("Hi")
        stream.__enter__()
        next(stream)
    with pytest.raises(StreamInterrupted) as caught:
        next(stream)
    assert caught.value.partial == "Hel"
    with pytest.raises(Unavailable):
        client.model()
    client.close()
