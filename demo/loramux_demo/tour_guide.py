"""The parts of the tour, in order."""

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from loramux import AdapterVersion, AsyncClient
from loramux_demo import corpus, judge, wordings
from loramux_demo.answers import Question
from loramux_demo.embedded import publish_embedded
from loramux_demo.tenants import TENANTS
from loramux_demo.tour_errors import TourError
from loramux_demo.tour_meter import Answer, Meter
from loramux_demo.tour_newcomer import Newcomer
from loramux_demo.tour_screen import Screen, printable
from loramux_demo.tour_server import DemoServer

SUBJECT = "Austria"
"""Everything about it is the question of the first part."""
LONG_SUBJECTS = ("Norway", "Peru", "Japan")
"""Everything about them is the long answer in which traffic moves."""
SWAP_AFTER = 12
"""Pieces of the long answer after which it does."""

_NARROW = 72


@dataclasses.dataclass(kw_only=True)
class _Voice:
    """One of the streams side by side."""

    name: str
    adapter: str | None
    form: str
    shape: str
    colour: str
    text: str = ""
    verdict: Text = dataclasses.field(default_factory=Text)


class Tour:
    """One run of the tour.

    Args:
        screen: Where it shows.
        work: Scratch directory.
        base: Quantized base.
        adapters: Tenants' adapters.
    """

    def __init__(self, screen: Screen, work: Path, *, base: Path, adapters: Path) -> None:
        self._screen = screen
        self._work = work
        self._base = base
        self._adapters = adapters
        self._meter = Meter()

    async def run(self, *, train: bool) -> None:
        """Start the server, show everything, stop it.

        Raises:
            TourError: A part cannot be shown.
            LoramuxError: The server refused something.
        """
        screen = self._screen
        screen.rule("loramux: one quantized base, many tenants' adapters, one batch")
        screen.print(
            f"[bold]{describe_base(self._base)}, to show the machinery[/bold]: it knows some geography, chemistry and "
            "arithmetic, nothing else. Everything below is computed now, on this machine's CPU."
        )
        server = DemoServer(self._base, self._work / "store", log=self._work / "server.log")
        async with server, AsyncClient(server.address) as client:
            await self.visit(client, seconds=server.seconds)
            if train:
                await Newcomer(screen, self._meter, self._work, self._base).show(client, server.address)
            screen.rule("What ran")
            screen.print(self._meter.table())
        screen.print("Serve it yourself: [bold]make serve[/bold]. The server and everything else that ran has ended.")

    async def visit(self, client: AsyncClient, *, seconds: float) -> None:
        """Upload the adapters and show the parts that need no training.

        Args:
            client: Of the running server.
            seconds: What its start took.
        """
        model = await client.model()
        self._screen.print(
            f"server ready after {seconds:.1f} s, base {model.fingerprint.digest[:12]} in NF4; adapters: "
            + "acme (JSON), globex (German), initech v1 and v2 (house styles)",
            end="\n\n",
        )
        versions = await publish_embedded(client, self._adapters)
        await self._side_by_side(client)
        await self._hot_swap(client, versions["initech-v1"], versions["initech-v2"])

    async def _side_by_side(self, client: AsyncClient) -> None:
        screen = self._screen
        screen.rule("1. One question, three answers, one batch")
        question, text = corpus.profile_question([SUBJECT]), _profile_text([SUBJECT])
        _say(screen, text)
        voices = [
            _Voice(name="base", adapter=None, form="plain", shape="English text", colour="white"),
            _Voice(name="acme", adapter="acme", form=TENANTS["acme"], shape="JSON", colour="yellow"),
            _Voice(name="globex", adapter="globex", form=TENANTS["globex"], shape="German text", colour="cyan"),
        ]
        arrivals: list[_Voice] = []

        def panels() -> RenderableType:
            return _panels(voices, screen.width, plain=not screen.terminal)

        def listen(voice: _Voice, changed: Callable[[], None]) -> Callable[[str], None]:
            def on_text(piece: str) -> None:
                voice.text += printable(piece)
                arrivals.append(voice)
                changed()

            return on_text

        with screen.live(panels) as changed:
            answers = await asyncio.gather(
                *(
                    self._meter.ask(client, _user(text), adapter=voice.adapter, on_text=listen(voice, changed))
                    for voice in voices
                )
            )
            for voice, answer in zip(voices, answers, strict=True):
                right = judge.is_right(_item(voice.form, text, question), answer.text)
                words = f" {voice.shape}" if right else f" not the right {voice.shape}"
                voice.verdict = Text.assemble(screen.mark(right), words)
            changed()
        screen.print(_arrival_line(arrivals, screen.width))
        screen.print()

    async def _hot_swap(self, client: AsyncClient, first: AdapterVersion, second: AdapterVersion) -> None:
        screen = self._screen
        screen.rule("2. initech's traffic moves from v1 to v2 in the middle of a stream")
        await client.adapters.preload(f"initech@{second.name.rpartition('/')[2]}")
        text, short = _profile_text(LONG_SUBJECTS), f"What is the capital of {SUBJECT}?"
        _say(screen, text)
        pieces: list[str] = []
        begun, moved = asyncio.Event(), 0
        running = Text()

        async def move() -> Answer:
            nonlocal moved
            await begun.wait()
            await client.adapters.promote("initech", second)
            moved = len(pieces)
            running.append("" if running.plain.endswith((" ", "\n")) else " ")
            running.append("[traffic moves to v2]", style="black on yellow").append(" ")
            changed()
            return await self._meter.ask(client, _user(short), adapter="initech")

        def on_text(piece: str) -> None:
            pieces.append(piece)
            running.append(printable(piece), style="cyan")
            changed()
            if len(pieces) >= SWAP_AFTER:
                begun.set()

        with screen.live(lambda: running) as changed:
            mover = asyncio.create_task(move())
            try:
                long = await self._meter.ask(client, _user(text), adapter="initech", max_tokens=400, on_text=on_text)
                if not moved or moved == len(pieces):
                    raise TourError(f"the long answer ended after {len(pieces)} pieces, before traffic had moved")
                within = "asked and answered" if mover.done() else "asked"
                after = await mover
            finally:
                mover.cancel()
                await asyncio.gather(mover, return_exceptions=True)
        screen.print(_signed("v1", long.version, f"{len(pieces) - moved} of its {len(pieces)} pieces after the move"))
        _say(screen, short)
        screen.print(Text(printable(after.text), style="magenta"))
        screen.print(_signed("v2", after.version, f"{within} while that ran"), end="\n\n")
        if (long.version, after.version) != (first.name, second.name):
            raise TourError(f"the answers came from {long.version} and {after.version}, not from v1 and then v2")


def describe_base(base: Path) -> str:
    """`7M-parameter demo model`, by the file that the training of the base wrote."""
    try:
        parameters = json.loads((base / "demo.json").read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError):
        return "A tiny demo model"
    return f"{round(parameters / 1e6, 1):g}M-parameter demo model"


def _profile_text(subjects: Sequence[str]) -> str:
    return corpus.profile_text(subjects, wordings.PROFILE_TRAINING[1])


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _item(form: str, text: str, question: Question) -> judge.Item:
    return judge.Item(category="tour", form=form, messages=_user(text), question=question)


def _say(screen: Screen, text: str) -> None:
    screen.print(Text(f"> {text}", style="bold"))


def _panels(voices: Sequence[_Voice], width: int, *, plain: bool) -> RenderableType:
    if plain:
        return Group(*(Text.assemble(voice.name, " (", voice.verdict, "):\n", voice.text) for voice in voices))
    each = width if width < _NARROW else width // len(voices)
    panels = [
        Panel(Text(voice.text), title=voice.name, subtitle=voice.verdict, border_style=voice.colour, width=each)
        for voice in voices
    ]
    return Group(*panels) if width < _NARROW else Columns(panels, padding=0)


def _arrival_line(arrivals: Sequence[_Voice], width: int) -> Text:
    line = Text("pieces as they arrived: ", style="dim")
    for voice in itertools.islice(arrivals, max(10, width - len(line) - 1)):
        line.append(voice.name[0], style=f"not dim {voice.colour}")
    return line


def _signed(label: str, version: str, remark: str) -> Text:
    digest = version.rpartition("/")[2]
    return Text.assemble(("  answered by ", "dim"), (f"{label}, digest {digest}", "bold"), (f": {remark}", "dim"))
