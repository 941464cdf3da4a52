"""The embedded base and its tenants' adapters, judged through one server process, in one batch that mixes them."""

import asyncio
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest

from loramux import AdapterVersion, AsyncClient, ServerStatus
from loramux_demo.judge import CATEGORIES, Item, Score, base_items, score, shows_form, table
from loramux_demo.paths import ADAPTERS, BASE
from loramux_demo.tenants import judge_items
from tests.e2e.real_server import RealServer
from tests.support.demo_server import SERVED, Lane, LaneRun, demo_server, upload

pytestmark = [
    pytest.mark.timeout(240),
]

QUESTIONS = 200
REQUIRED = 0.9
MOST_UNASKED = 0.02
WIDTH = 25
"""Open questions of the base and of each adapter: together 125, fewer than the sequences of a step."""


class Counted(NamedTuple):
    """The engine's own counts."""

    steps: float
    decode_tokens: float

    @classmethod
    def of(cls, server: RealServer) -> "Counted":
        """Read them from /metrics."""
        metrics = server.metrics()
        return cls(metrics["loramux_engine_steps_total"], metrics["loramux_engine_decode_tokens_total"])


class Judged(NamedTuple):
    """Everything that was asked, and what the server says of itself.

    Attributes:
        base: Scores of the base by category.
        adapters: Score of each data set's adapter.
        unasked: The adapters' questions with the base's answers without adapter and instruction, by data set.
        lanes: The base's lane, then one an adapter.
        versions: The uploaded versions by data set.
        mixed: Counts while the base and every adapter had questions waiting.
        metrics: At the end.
        status: At the end.
    """

    base: Mapping[str, Score]
    adapters: Mapping[str, Score]
    unasked: Mapping[str, list[tuple[Item, str]]]
    lanes: list[Lane]
    versions: Mapping[str, AdapterVersion]
    mixed: Counted
    metrics: Mapping[str, float]
    status: ServerStatus


async def _ask(server: RealServer, lanes: list[Lane]) -> tuple[Counted, ServerStatus]:
    before = Counted.of(server)
    async with AsyncClient(server.address) as client:
        run = LaneRun(client, lanes, width=WIDTH)
        async with asyncio.TaskGroup() as group:
            group.create_task(run.run())
            await run.first_lane_done.wait()
            # The engine reports every quarter of a second: this is at most that old, so all of it was mixed.
            after = await asyncio.to_thread(Counted.of, server)
        status = await client.status()
    await asyncio.sleep(0.3)  # the last report of the engine
    return Counted(*(late - early for early, late in zip(before, after, strict=True))), status


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judged]:
    """Ask the base in held-out wordings, each adapter about held-out subjects, and the base the adapters' questions."""
    of_base = base_items(QUESTIONS, seed=71)
    of_adapters = {data_set: judge_items(data_set, QUESTIONS, seed=72) for data_set in SERVED}
    unasked = [item for items in of_adapters.values() for item in items]
    with demo_server(BASE, tmp_path_factory.mktemp("quality") / "store") as server:
        versions = upload(server.address, ADAPTERS)
        lanes = [Lane(adapter=None, items=[*of_base, *unasked])]
        lanes += [Lane(adapter=versions[data_set].name, items=items) for data_set, items in of_adapters.items()]
        mixed, status = asyncio.run(_ask(server, lanes))
        metrics = server.metrics()
    texts = lanes[0].texts
    plain: dict[str, list[tuple[Item, str]]] = {data_set: [] for data_set in SERVED}
    for item, text in zip(unasked, texts[len(of_base) :], strict=True):
        plain[item.category].append((item, text))
    adapters: dict[str, Score] = {}
    for lane in lanes[1:]:
        adapters.update(score(lane.items, lane.texts))
    judged = Judged(score(of_base, texts[: len(of_base)]), adapters, plain, lanes, versions, mixed, metrics, status)
    print(f"\n{table(judged.base)}\n{table(judged.adapters)}")
    yield judged


def _told(category: str, result: Score) -> str:
    misses = "\n".join(f"  right: {right!r}\n  given: {given!r}" for right, given in result.misses)
    return f"{table({category: result})}; for example\n{misses}"


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_base_answers_held_out_wordings(judged: Judged, category: str) -> None:
    result = judged.base[category]
    assert result.asked >= 200
    assert result.accuracy >= REQUIRED, _told(category, result)


@pytest.mark.parametrize("data_set", SERVED)
def test_an_adapter_gives_the_right_content_in_its_form(judged: Judged, data_set: str) -> None:
    result = judged.adapters[data_set]
    assert result.asked >= 200
    assert result.accuracy >= REQUIRED, _told(data_set, result)


@pytest.mark.parametrize("data_set", SERVED)
def test_the_base_shows_the_form_only_when_asked(judged: Judged, data_set: str) -> None:
    pairs = judged.unasked[data_set]
    shown = [text for item, text in pairs if shows_form(item.form, item.question, text)]
    assert len(pairs) >= 200
    assert len(shown) <= MOST_UNASKED * len(pairs), f"{len(shown)} of {len(pairs)}, for example {shown[:5]}"


def test_every_answer_comes_from_the_version_asked_for(judged: Judged) -> None:
    for lane in judged.lanes:
        assert {answer.adapter_version for answer in lane.answers} == {lane.adapter}
    assert [lane.adapter for lane in judged.lanes] == [None, *(judged.versions[name].name for name in SERVED)]
    digests = {
        answer.started.adapter.digest for lane in judged.lanes[1:] for answer in lane.answers if answer.started.adapter
    }
    assert digests == {version.digest for version in judged.versions.values()}
    assert len(digests) == len(SERVED)


def test_steps_mixed_the_base_and_the_adapters(judged: Judged) -> None:
    """No lane has more than `WIDTH` open questions, so a step with three of them decodes at most `3 * WIDTH` tokens."""
    assert judged.mixed.steps > 20
    assert judged.mixed.decode_tokens / judged.mixed.steps > 3 * WIDTH, judged.mixed
    metrics = judged.metrics
    assert metrics["loramux_slab_versions"] == len(SERVED)
    assert metrics["loramux_adapter_loads_total"] == len(SERVED), "each was loaded once and stayed"
    assert metrics["loramux_adapter_evictions_total"] == 0
    assert metrics["loramux_preemptions_total"] == 0
    assert judged.status.total is not None
    assert judged.status.total.device_adapters == len(SERVED)
    answers = [answer for lane in judged.lanes for answer in lane.answers]
    computed = metrics["loramux_engine_decode_tokens_total"] + len(answers)
    assert computed == sum(answer.usage.output_tokens for answer in answers), "every token came from one of these steps"
