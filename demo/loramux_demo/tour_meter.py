"""Streams of the tour and the table that ends it."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from loramux import AsyncClient, ChatMessage

PREFIX = "tenants/default/adapters/"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished stream.

    Attributes:
        text: All of it.
        version: Version that the server named; empty for the base.
        ttft: Seconds to the first token.
        seconds: Seconds of the whole call.
        tokens: Output tokens.
    """

    text: str
    version: str
    ttft: float
    seconds: float
    tokens: int


class Meter:
    """Runs streams and keeps what they took."""

    def __init__(self) -> None:
        self._answers: list[Answer] = []

    async def ask(
        self,
        client: AsyncClient,
        messages: Sequence[Mapping[str, str]],
        *,
        adapter: str | None,
        max_tokens: int = 256,
        on_text: Callable[[str], None] = lambda _: None,
    ) -> Answer:
        """Stream one chat greedily.

        Args:
            client: Of the server.
            messages: OpenAI messages.
            adapter: Adapter to use; None for the base.
            max_tokens: Most tokens of the answer.
            on_text: Called with each piece as it arrives.
        """
        chat = [ChatMessage(message["role"], message["content"]) for message in messages]
        texts = []
        began = time.perf_counter()
        first: float | None = None
        async with client.generate(chat, adapter=adapter, max_tokens=max_tokens, temperature=0) as stream:
            async for delta in stream:
                first = time.perf_counter() if first is None else first
                if delta.text:
                    texts.append(delta.text)
                    on_text(delta.text)
            ended = time.perf_counter()
            answer = Answer(
                text="".join(texts),
                version=stream.started.adapter_version or "",
                ttft=(ended if first is None else first) - began,
                seconds=ended - began,
                tokens=stream.usage.output_tokens,
            )
        self._answers.append(answer)
        return answer

    def table(self) -> Table:
        """Requests, time to first token and tokens a second by the version that answered."""
        table = Table(show_footer=True)
        answers = self._answers
        rows = [("all", answers)] + [
            (shown_version(version) or "base", [answer for answer in answers if answer.version == version])
            for version in dict.fromkeys(sorted(answer.version for answer in answers))
        ]
        columns = [(name, _figures(chosen)) for name, chosen in rows if chosen]
        totals = columns[0][1] if columns else ("0", "", "0", "")
        table.add_column("answered by", footer="all", overflow="fold")  # two versions stay told apart
        headers = ("requests", "TTFT ms (p50)", "output tokens", "tokens/s a stream")
        for header, total in zip(headers, totals, strict=True):
            table.add_column(header, justify="right", footer=total)
        for name, figures in columns[1:]:
            table.add_row(name, *figures)
        return table


def shown_version(version: str) -> str:
    """A version as `adapter@version`, the short form that requests take too."""
    return "@".join(version.removeprefix(PREFIX).split("/versions/"))


def _figures(answers: Sequence[Answer]) -> tuple[str, str, str, str]:
    ttft = sorted(answer.ttft for answer in answers)[len(answers) // 2]
    tokens = sum(answer.tokens for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    return str(len(answers)), f"{1000 * ttft:.0f}", str(tokens), f"{tokens / seconds:.0f}" if seconds else ""
