"""Servers and clients of the contract tests: every body runs on both clients and on both servers.

The real server joins where the packages of `loramux[server]` are installed; the fake one is always there.
"""

import importlib.util
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from loramux import AsyncClient, Client
from loramux.testing import FakeServer, Reply
from tests.contract.faces import Face

SERVERS = ["fake", *(["real"] if importlib.util.find_spec("torch") is not None else [])]


class ContractServer(Protocol):
    """What a contract test may ask of a server."""

    address: str

    def write_adapter(self, directory: Path, seed: int) -> None:
        """Write an adapter that the server takes."""

    def long_generation(self) -> dict[str, Any]:
        """Options of a generation that takes a second or more."""


class _Fake:
    """The fake server in that role; it takes any bytes."""

    def __init__(self, server: FakeServer) -> None:
        self.address = server.address
        self._server = server

    def write_adapter(self, directory: Path, seed: int) -> None:
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
        (directory / "adapter_model.safetensors").write_bytes(bytes([seed]) * 4096)

    def long_generation(self) -> dict[str, Any]:
        self._server.reply(Reply(["x"], hang=True))
        return {}


@pytest.fixture(scope="session", params=SERVERS)
def contract_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ContractServer]:
    """One server for all tests: each takes names of its own."""
    with ExitStack() as stack:
        if request.param == "fake":
            yield _Fake(stack.enter_context(FakeServer()))
        else:
            from tests.contract.real_server import running_server  # torch, only where it is needed

            yield stack.enter_context(running_server(tmp_path_factory.mktemp("real")))


@pytest.fixture
def server_address(contract_server: ContractServer) -> str:
    return contract_server.address


@pytest.fixture(params=["sync", "asyncio"])
async def client(request: pytest.FixtureRequest, server_address: str) -> AsyncIterator[Any]:
    """The asyncio client, and the blocking one with its face."""
    made: Any = Face(Client(server_address)) if request.param == "sync" else AsyncClient(server_address)
    async with made:
        yield made
