import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from loramux import AsyncClient
from loramux.testing import FakeServer, Reply
from loramux_demo.answers import answer
from loramux_demo.embedded import check_embedded, publish_embedded
from loramux_demo.paths import EMBEDDED_ADAPTERS
from loramux_demo.tour_errors import TourError
from loramux_demo.tour_guide import SWAP_AFTER, Tour, describe_base
from loramux_demo.tour_newcomer import UNSEEN, is_reworded, unseen
from loramux_demo.tour_screen import Screen
from tests.support.adapters import tensors_of, tiny_base, write_adapter, write_base

PLAIN = (
    "The capital of Austria is Vienna. The continent of Austria is Europe. The currency of Austria is the euro. "
    "The German name of Austria is Österreich."
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for index, name in enumerate(EMBEDDED_ADAPTERS):
        write_adapter(root / name, tensors_of(tiny_base(), value=1 + index))
    return root


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    (tmp_path / "base" / "demo.json").write_text(json.dumps({"parameters": 6_961_000}))
    return tmp_path / "base"


def tour(base: Path, adapters: Path, *, width: int = 100) -> tuple[Tour, io.StringIO]:
    file = io.StringIO()
    screen = Screen(Console(file=file, width=width, highlight=False))
    return Tour(screen, base.parent, base=base, adapters=adapters), file


async def test_the_parts_without_training(server: FakeServer, base: Path, adapters: Path) -> None:
    long = [f"word{number} " for number in range(3 * SWAP_AFTER)]
    server.reply(*(Reply([PLAIN]) for _ in range(3)), Reply(long, delay=0.02), Reply(["v2 answers"]))
    guide, file = tour(base, adapters)
    async with AsyncClient(server.address) as client:
        await guide.visit(client, seconds=1.0)
    out = file.getvalue()
    assert "base (✓ English text):" in out and "acme (✗ not the right JSON):" in out
    order = [out.index(text) for text in ("word0 ", "traffic moves to v2", f"word{len(long) - 1}", "v2 answers")]
    assert order == sorted(order)
    calls = {call.request.adapter for call in server.calls_of("Generate")}
    assert len(calls) == 4, "the base and three adapters"
    versions = [line.partition("digest ")[2][:16] for line in out.splitlines() if "answered by v" in line]
    assert len(set(versions)) == 2


async def test_a_long_answer_that_ends_before_traffic_moves_is_told(
    server: FakeServer, base: Path, adapters: Path
) -> None:
    server.reply(*(Reply([PLAIN]) for _ in range(3)), Reply(["all at once"]))
    guide, _ = tour(base, adapters)
    async with AsyncClient(server.address) as client:
        with pytest.raises(TourError, match="ended after 1 pieces, before traffic had moved"):
            await guide.visit(client, seconds=1.0)


@pytest.mark.parametrize("width", [40, 80, 100])
async def test_no_line_is_wider_than_the_terminal(server: FakeServer, base: Path, adapters: Path, width: int) -> None:
    server.reply(*(Reply([PLAIN]) for _ in range(3)), Reply(["w "] * 40, delay=0.01), Reply(["v2"]))
    guide, file = tour(base, adapters, width=width)
    async with AsyncClient(server.address) as client:
        await guide.visit(client, seconds=1.0)
    assert max(map(len, file.getvalue().splitlines())) <= width


async def test_traffic_that_somebody_has_set_stays(server: FakeServer, adapters: Path) -> None:
    async with AsyncClient(server.address) as client:
        versions = await publish_embedded(client, adapters)
        assert (await client.adapters.get("initech")).serving_version == versions["initech-v1"].name
        await client.adapters.promote("initech", versions["initech-v2"])
        again = await publish_embedded(client, adapters)
        assert (await client.adapters.get("initech")).serving_version == versions["initech-v2"].name
    assert {name: version.name for name, version in again.items()} == {
        name: version.name for name, version in versions.items()
    }


def test_the_size_comes_from_the_base(base: Path, tmp_path: Path) -> None:
    assert describe_base(base) == "7M-parameter demo model"
    (base / "demo.json").write_text(json.dumps({"parameters": 3_674_368}))
    assert describe_base(base) == "3.7M-parameter demo model"
    assert describe_base(tmp_path) == "A tiny demo model"


def test_what_is_missing_is_named(base: Path, adapters: Path, tmp_path: Path) -> None:
    check_embedded(base, adapters)
    with pytest.raises(TourError, match=r"no base model in .*nowhere.*--base"):
        check_embedded(tmp_path / "nowhere", adapters)
    with pytest.raises(TourError, match=r"no adapter in .*acme.*--adapters"):
        check_embedded(base, tmp_path)


def test_the_unseen_questions_differ() -> None:
    items = unseen(UNSEEN)
    assert len({item.messages[-1]["content"] for item in items}) == UNSEEN


def test_content_in_the_bases_own_words_is_told_from_content_in_the_form() -> None:
    item = unseen(1)[0]
    assert not is_reworded(item, answer(item.question, item.form))
    assert is_reworded(item, answer(item.question, "plain"))
    assert not is_reworded(item, "something else")
