"""A fake server, both clients, and a clock that never sleeps for those who give it to one."""

from collections.abc import AsyncIterator, Iterator

import pytest

from loramux import AsyncClient, Client
from loramux.testing import FakeServer
from tests.support.client_clock import FakeClock


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address) as open_client:
        yield open_client


@pytest.fixture
async def async_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address) as open_client:
        yield open_client


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
