"""Streams of the tour and the table that ends it."""

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence

from rich.table import Table

from loramux import AsyncClient, ChatMessage


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    version: str
    ttft: float
    seconds: float
    tokens: int


class Meter:
    """Runs streams and keeps what they took."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self.last_version = ""
        """Version that the last finished stream named; empty for the base."""

    async def stream(
        self, client: AsyncClient, messages: Sequence[ChatMessage], *, adapter: str | None, max_tokens: int = 200
    ) -> AsyncIterator[str]:
        """Greedy text of one chat, piece by piece."""
        began = time.perf_counter()
        first: float | None = None
        async with client.generate(messages, adapter=adapter, max_tokens=max_tokens, temperature=0) as stream:
            async for delta in stream:
                first = time.perf_counter() if first is None else first
                if delta.text:
                    yield delta.text
            ended = time.perf_counter()
            version = stream.started.adapter_version or ""
            self.last_version = version
            self._calls.append(_Call(version, (first or ended) - began, ended - began, stream.usage.output_tokens))

    def table(self) -> Table:
        """Requests, time to first token and tokens a second by the version that answered."""
        table = Table()
        for column in ("answered by", "requests", "TTFT ms p50", "output tokens", "tokens/s a stream"):
            table.add_column(column, justify="left" if column == "answered by" else "right")
        for version in sorted({call.version for call in self._calls}):
            calls = [call for call in self._calls if call.version == version]
            ttft = sorted(call.ttft for call in calls)[len(calls) // 2]
            tokens = sum(call.tokens for call in calls)
            table.add_row(
                version.removeprefix("tenants/default/adapters/") or "base",
                str(len(calls)),
                f"{1000 * ttft:.0f}",
                str(tokens),
                f"{tokens / sum(call.seconds for call in calls):.0f}",
            )
        return table
