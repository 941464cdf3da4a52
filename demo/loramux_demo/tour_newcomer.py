"""The tour's last part: a new tenant's adapter, trained on this CPU and published into the running server."""

import asyncio
import dataclasses
import sys
import time
from pathlib import Path

from rich.table import Table
from rich.text import Text

from loramux import AsyncClient
from loramux_demo import judge, tenants, train_tenants
from loramux_demo.tour_meter import Meter
from loramux_demo.tour_program import run_program
from loramux_demo.tour_screen import Screen, printable

NEWCOMER = "hooli"
UNSEEN = 20
_MARK = 3


class Newcomer:
    """Trains, publishes and compares.

    Args:
        screen: Where it shows.
        meter: Asks the server.
        work: Scratch directory.
        base: Quantized base.
    """

    def __init__(self, screen: Screen, meter: Meter, work: Path, base: Path) -> None:
        self._screen = screen
        self._meter = meter
        self._work = work
        self._base = base

    async def show(self, client: AsyncClient, address: str) -> None:
        """Ask, train, publish, ask again.

        Args:
            client: Of the running server.
            address: Its `host:port`.

        Raises:
            TourError: Training or publication failed.
        """
        screen, work = self._screen, self._work
        screen.rule(f"3. A new tenant, {NEWCOMER}: trained on this CPU, published into the running server")
        config = train_tenants.write_job(NEWCOMER, work, base=self._base)
        items = unseen(UNSEEN)
        before = await self._ask(client, items, None)
        trainer = [sys.executable, "-m", "loramux_trainer"]
        screen.print(f"[bold]$ loramux-train train {config.name} -o device=cpu[/bold]")
        began = time.monotonic()
        await run_program(screen, [*trainer, "train", str(config), "-o", "device=cpu"], what="training")
        taken = time.monotonic() - began
        screen.print(f"[bold]$ loramux-train publish {NEWCOMER} --server {address} --name {NEWCOMER}[/bold]")
        publish = [*trainer, "publish", str(work / NEWCOMER), "--server", address, "--name", NEWCOMER]
        await run_program(screen, publish, what="publication")
        after = await self._ask(client, items, NEWCOMER)
        screen.print(self._table(items, before, after))
        screen.print(_summary(items, before, after))
        screen.print(f"Trained in {taken:.0f} s, start and evaluation included.", end="\n\n")

    async def _ask(self, client: AsyncClient, items: list[judge.Item], adapter: str | None) -> list[str]:
        answers = await asyncio.gather(
            *(self._meter.ask(client, item.messages, adapter=adapter, max_tokens=64) for item in items)
        )
        return [answer.text for answer in answers]

    def _table(self, items: list[judge.Item], before: list[str], after: list[str]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        room = max(30, self._screen.width - 2 * _MARK - 4)
        for title, share, style in (("unseen question", 0.42, ""), ("before: the base", 0.36, "dim")):
            table.add_column(title, width=int(share * room), no_wrap=True, overflow="ellipsis", style=style)
            if style:
                table.add_column("", width=_MARK)
        table.add_column(f"after: {NEWCOMER}", width=int(0.22 * room), no_wrap=True, overflow="ellipsis")
        table.add_column("", width=_MARK)
        for item, old, new in zip(items, before, after, strict=True):
            table.add_row(
                Text(item.messages[-1]["content"]),
                Text(_line(old)),
                self._mark(item, old),
                Text(_line(new)),
                self._mark(item, new),
            )
        return table

    def _mark(self, item: judge.Item, text: str) -> Text:
        if is_reworded(item, text):
            return Text("~", style="yellow")
        return self._screen.mark(judge.is_right(item, text))


def unseen(count: int) -> list[judge.Item]:
    """Different questions about subjects that are not in the newcomer's data, in wordings that no data has."""
    found: dict[str, judge.Item] = {}
    for item in tenants.judge_items(NEWCOMER, 10 * count, seed=2):
        found.setdefault(item.messages[-1]["content"], item)
    return list(found.values())[:count]


def is_reworded(item: judge.Item, text: str) -> bool:
    """Whether a text has the right content as the base words it, not in the form asked for."""
    return not judge.is_right(item, text) and judge.is_right(dataclasses.replace(item, form="plain"), text)


def _summary(items: list[judge.Item], before: list[str], after: list[str]) -> Text:
    line = Text(f"right and in {NEWCOMER}'s form: ", style="bold")
    for texts, when in ((before, "before"), (after, "after")):
        right = sum(judge.is_right(item, text) for item, text in zip(items, texts, strict=True))
        reworded = sum(is_reworded(item, text) for item, text in zip(items, texts, strict=True))
        line.append(f"{right} of {len(items)} {when}")
        line.append(f" (~ {reworded} more right as the base words it), " if when == "before" else ".")
    return line


def _line(text: str) -> str:
    return printable(" ".join(text.split()))
