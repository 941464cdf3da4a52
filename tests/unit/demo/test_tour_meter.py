import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from loramux import AsyncClient
from loramux.testing import FakeServer, Reply
from loramux_demo.tour_meter import Meter, shown_version
from tests.support.adapters import tensors_of, tiny_base, write_adapter

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
    assert shown_version("tenants/default/adapters/a/versions/1") == "a@1"
    assert shown_version("") == ""


async def test_a_narrow_terminal_cuts_no_version_off(fake: FakeServer, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter", tensors_of(tiny_base()))
    meter, file = Meter(), io.StringIO()
    async with AsyncClient(fake.address) as client:
        version = await client.adapters.upload(directory, name="initech", promote=True)
        await meter.ask(client, QUESTION, adapter="initech")
    Console(file=file, width=60).print(meter.table())
    rows = [line.split("│")[1].strip() for line in file.getvalue().splitlines() if line.startswith("│")]
    assert "".join(rows[:-1]) == f"initech@{version.name.rpartition('/')[2]}"
