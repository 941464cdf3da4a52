"""A fake server and both clients."""

from collections.abc import AsyncIterator, Iterator

import pytest

from loramux import AsyncClient, Client
from loramux.testing import FakeServer


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
