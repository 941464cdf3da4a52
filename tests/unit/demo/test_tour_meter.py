import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from loramux import AsyncClient
from loramux.testing import FakeServer, Reply
from loramux_demo.tour_meter import Meter, shown_version

QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


async def test_an_answer_has_its_pieces_tokens_and_version(fake: FakeServer) -> None:
    fake.reply(Reply(["Hel", "lo"]))
    pieces: list[str] = []
    async with AsyncClient(fake.address) as client:
        answer = await Meter().ask(client, QUESTION, adapter=None, on_text=pieces.append)
    assert pieces == ["Hel", "lo"]
    assert (answer.text, answer.version) == ("Hello", "")
    assert answer.tokens > 0
    assert 0 <= answer.ttft <= answer.seconds


async def test_the_table_has_a_row_a_version_and_a_total(fake: FakeServer) -> None:
    meter = Meter()
    async with AsyncClient(fake.address) as client:
        for _ in range(3):
            await meter.ask(client, QUESTION, adapter=None)
    file = io.StringIO()
    Console(file=file, width=100).print(meter.table())
    lines = [line for line in file.getvalue().splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == ["base", "all"]
    assert {line.split("│")[2].strip() for line in lines} == {"3"}


def test_the_table_of_nothing() -> None:
    file = io.StringIO()
    Console(file=file, width=100).print(Meter().table())
    assert "all" in file.getvalue()


def test_versions_are_shown_without_the_tenant() -> None:
    assert shown_version("tenants/default/adapters/a/versions/1") == "a/versions/1"
