"""A server on the demo's base with its tenants' adapters, and questions asked of it in one mixed batch."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux import AdapterVersion, AsyncClient, ChatMessage, Client, GenerationResult
from loramux_demo.judge import Item
from loramux_demo.paths import EMBEDDED_ADAPTERS
from tests.e2e.real_server import RealServer

SERVED = tuple(EMBEDDED_ADAPTERS)
"""Data sets that the demo carries an adapter of."""

LONGEST_ANSWER = 360


@contextlib.contextmanager
def demo_server(base: Path, store: Path, *flags: str) -> Iterator[RealServer]:
    """Run a server of a quantized base on one thread of the CPU until the block ends; everything else is as shipped.

    Args:
        base: The base.
        store: Directory of the store; created if missing.
        *flags: Further flags.
    """
    fixed = ("--weights", "nf4", "--device", "cpu", "--threads", "1", "--max-running", "128")
    server = RealServer("--model", str(base), "--store", str(store), *fixed, *flags)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def upload(address: str, adapters: Path) -> dict[str, AdapterVersion]:
    """Upload every served data set's adapter; those of `initech` become two versions of one adapter.

    Args:
        address: Of the server.
        adapters: One adapter directory a data set.

    Returns:
        The version made of each data set; the first of an adapter gets its traffic.
    """
    versions: dict[str, AdapterVersion] = {}
    promoted: set[str] = set()
    with Client(address) as client:
        for data_set, name in EMBEDDED_ADAPTERS.items():
            first = name not in promoted
            versions[data_set] = client.adapters.upload(adapters / data_set, name=name, promote=first)
            promoted.add(name)
    return versions


@dataclass(kw_only=True)
class Lane:
    """Questions to one adapter version, in order.

    Attributes:
        adapter: The version's name; None = the base alone.
        items: The questions.
        results: Their answers, filled by `LaneRun.run`.
    """

    adapter: str | None
    items: Sequence[Item]
    results: list[GenerationResult | None] = field(default_factory=list)

    @property
    def answers(self) -> list[GenerationResult]:
        """The answers, in order of the questions."""
        return [result for result in self.results if result is not None]

    @property
    def texts(self) -> list[str]:
        """The answers' texts, in order of the questions."""
        return [result.text for result in self.answers]


class LaneRun:
    """Asks the questions of several lanes at once, all greedy.

    As long as every lane has questions left, each has at most `width` open: a step in which only one of them takes part
    cannot give more than `width` tokens. A lane that is done lends its width to the others.

    Args:
        client: Connected to the server.
        lanes: The lanes.
        width: Open questions of a lane.
    """

    def __init__(self, client: AsyncClient, lanes: Sequence[Lane], *, width: int) -> None:
        self._client = client
        self._lanes = lanes
        self._width = width
        self._waiting = [iter(enumerate(lane.items)) for lane in lanes]
        self.first_lane_done = asyncio.Event()
        """Set when the first lane has no question left to send."""

    async def run(self) -> None:
        """Ask everything."""
        for lane in self._lanes:
            lane.results = [None] * len(lane.items)
        async with asyncio.TaskGroup() as group:
            for own in range(len(self._lanes)):
                for _ in range(self._width):
                    group.create_task(self._work(own))

    async def _work(self, own: int) -> None:
        count = len(self._lanes)
        for index in (own, *(other for other in range(count) if other != own)):
            lane = self._lanes[index]
            for position, item in self._waiting[index]:
                lane.results[position] = await self._answer(lane.adapter, item)
            self.first_lane_done.set()

    async def _answer(self, adapter: str | None, item: Item) -> GenerationResult:
        messages = [ChatMessage(message["role"], message["content"]) for message in item.messages]
        stream = self._client.generate(messages, adapter=adapter, temperature=0, max_tokens=LONGEST_ANSWER)
        return await stream.result()
