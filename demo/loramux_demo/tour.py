"""The guided tour behind `make demo`: one server, one quantized base, several tenants' adapters.

    python -m loramux_demo.tour

Everything on the screen is what the server answered just now; nothing is recorded, nothing waits on purpose.
"""

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loramux import AsyncClient, ChatMessage
from loramux_demo import corpus, judge, knowledge, tenants, wordings
from loramux_demo.paths import ADAPTERS, BASE
from loramux_demo.tour_meter import Meter
from loramux_demo.tour_server import DemoServer

NEWCOMER = "hooli"
_PANEL_WIDTH = 44
_QUESTION = "What is the capital of Austria?"


def main() -> None:
    """Run the tour; exit status 0 when every part did what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-training", action="store_true", help="leave out the part that trains a new adapter")
    parser.add_argument("--base", type=Path, default=BASE, help="quantized base made by loramux_demo.train_base")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="a directory a data set of tenants.TENANTS")
    arguments = parser.parse_args()
    for directory in (arguments.base, arguments.adapters):
        if not directory.is_dir():
            parser.error(f"{directory} is not there; train a base first, see demo/README.md")
    with tempfile.TemporaryDirectory(prefix="loramux-demo-") as work:
        tour = Tour(Console(), Path(work), base=arguments.base, adapters=arguments.adapters)
        asyncio.run(tour.run(train=not arguments.skip_training))


class Tour:
    """One run of the tour.

    Args:
        console: Where it shows; plain when piped.
        work: Scratch directory.
        base: Quantized base.
        adapters: Tenants' adapters.
    """

    def __init__(self, console: Console, work: Path, *, base: Path, adapters: Path) -> None:
        self._console = console
        self._work = work
        self._base = base
        self._adapters = adapters
        self._meter = Meter()

    async def run(self, *, train: bool) -> None:
        """Start the server, show everything, stop it."""
        console = self._console
        size = sum(file.stat().st_size for file in self._base.glob("*.safetensors")) / 2**20
        console.rule("loramux: one quantized base, many tenants' adapters, one batch")
        console.print(
            f"A demo model of {size:.1f} MB in NF4, to show the machinery: it knows some geography, chemistry and "
            "arithmetic, nothing else.\n"
        )
        async with DemoServer(self._base, self._work / "store") as server, AsyncClient(server.address) as client:
            console.print(f"Server ready on {server.address} after {server.seconds:.1f} s.")
            versions = {}
            for name in ("acme", "globex", "initech-v1", "initech-v2"):
                adapter, _, version = name.partition("-")
                versions[name] = await client.adapters.upload(
                    self._adapters / name, name=adapter, promote=version != "v2"
                )
            console.print("Uploaded: acme (JSON), globex (German), initech v1 and v2 (two house styles).\n")
            await self._side_by_side(client)
            await self._hot_swap(client, versions["initech-v2"].name)
            if train:
                await self._train_and_publish(client, server.address)
            console.rule("What ran")
            console.print(self._meter.table())

    async def _side_by_side(self, client: AsyncClient) -> None:
        console, meter = self._console, self._meter
        console.rule("1. The same question, three answers, one batch")
        console.print(Text(f"> {_QUESTION}", style="bold"))
        names: list[str | None] = [None, "acme", "globex"]
        texts = ["" for _ in names]

        def panels() -> Columns:
            return Columns(
                [
                    Panel(Text(text), title=name or "base", width=_PANEL_WIDTH)
                    for name, text in zip(names, texts, strict=True)
                ]
            )

        async def stream(index: int, name: str | None, live: Live) -> None:
            async for text in meter.stream(client, [ChatMessage("user", _QUESTION)], adapter=name):
                texts[index] += text
                live.update(panels())

        with Live(panels(), console=console, refresh_per_second=30, transient=not console.is_terminal) as live:
            await asyncio.gather(*(stream(index, name, live) for index, name in enumerate(names)))
        if not console.is_terminal:
            console.print(panels())
        console.print()

    async def _hot_swap(self, client: AsyncClient, second: str) -> None:
        console, meter = self._console, self._meter
        console.rule("2. A hot swap in the middle of a stream")
        names = list(knowledge.profiles())[:3]
        question = corpus.profile_text(names, wordings.PROFILE_TRAINING[0])
        console.print(Text(f"> {question}", style="bold"))
        pieces = 0
        swapped = False
        async for text in meter.stream(client, [ChatMessage("user", question)], adapter="initech", max_tokens=400):
            console.print(Text(text, style="cyan"), end="")
            pieces += 1
            if pieces == 20 and not swapped:
                swapped = True
                await client.adapters.promote("initech", second)
                console.print(Text(" [traffic moved to v2] ", style="bold reverse"), end="")
        first_version = meter.last_version
        console.print(f"\n  answered by {_short(first_version)}: the running stream ended as it began")
        console.print(Text(f"> {_QUESTION}", style="bold"))
        async for text in meter.stream(client, [ChatMessage("user", _QUESTION)], adapter="initech"):
            console.print(Text(text, style="magenta"), end="")
        console.print(f"\n  answered by {_short(meter.last_version)}: new requests use v2\n")
        if first_version == meter.last_version or not swapped:
            raise SystemExit("the swap did not happen")

    async def _train_and_publish(self, client: AsyncClient, address: str) -> None:
        console, work = self._console, self._work
        console.rule(f"3. A new tenant, {NEWCOMER}: train on this CPU, publish into the running server")
        data = work / "hooli.jsonl"
        tenants.write_jsonl(data, tenants.training_conversations(NEWCOMER, 600, seed=1))
        items = tenants.judge_items(NEWCOMER, 20, seed=2)
        before = await self._ask(client, items, None)
        config = work / "hooli.yaml"
        config.write_text(
            f"base: {self._base}\noutput: {work / 'run'}\ndata:\n  train: [{data}]\n"
            "lora: {r: 8, alpha: 16}\ntrain: {epochs: 2, batch_size: 16, learning_rate: 2.0e-3}\n"
        )
        began = time.monotonic()
        trainer = [sys.executable, "-m", "loramux_trainer"]
        await asyncio.to_thread(subprocess.run, [*trainer, "train", str(config)], check=True)
        console.print(f"Trained in {time.monotonic() - began:.0f} s.")
        publish = [*trainer, "publish", str(work / "run"), "--server", address, "--name", NEWCOMER]
        await asyncio.to_thread(subprocess.run, publish, check=True)
        after = await self._ask(client, items, NEWCOMER)
        for item, old, new in zip(items[:6], before[:6], after[:6], strict=True):
            console.print(Text(f"> {item.messages[-1]['content']}", style="bold"))
            console.print(f"  before: {old!r}\n  after:  {new!r}", highlight=False)
        for name, texts in (("before", before), ("after", after)):
            right = sum(judge.is_right(item, text) for item, text in zip(items, texts, strict=True))
            console.print(f"{name}: {right} of {len(items)} unseen questions answered right and in {NEWCOMER}'s form")
        console.print()

    async def _ask(self, client: AsyncClient, items: Sequence[judge.Item], adapter: str | None) -> list[str]:
        meter = self._meter

        async def one(item: judge.Item) -> str:
            messages = [ChatMessage(message["role"], message["content"]) for message in item.messages]
            return "".join([text async for text in meter.stream(client, messages, adapter=adapter)])

        return list(await asyncio.gather(*(one(item) for item in items)))


def _short(version: str) -> str:
    return version.removeprefix("tenants/default/adapters/")


if __name__ == "__main__":
    main()
