"""Where the tour shows: live and coloured on a terminal, plain text in order elsewhere, and a picture if wanted."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

WIDTH = 100
"""Columns at most, so that lines stay readable and the picture fits a page."""

_FONT_FACE = re.compile(r"@font-face\s*\{.*?\}\s*", re.DOTALL)
_FONT = re.compile(r"font-family:\s*Fira Code, monospace")
_FONTS = "font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace"


_CONTROLS = {number: "\N{REPLACEMENT CHARACTER}" for number in (*range(32), *range(127, 160)) if chr(number) != "\n"}


def printable(text: str) -> str:
    """A model's text without characters that steer a terminal."""
    return text.translate(_CONTROLS)


class Screen:
    """The terminal or pipe that the tour writes to.

    Args:
        console: Of rich.
        record: Whether `save` will be asked for a picture.
    """

    def __init__(self, console: Console, *, record: bool = False) -> None:
        self.console = console
        self._recorder: Console | None = None
        if record:
            self._recorder = Console(
                record=True,
                file=io.StringIO(),
                force_terminal=True,
                color_system="truecolor",
                width=console.width,
                legacy_windows=False,
                highlight=False,
            )

    @classmethod
    def standard(cls, *, record: bool) -> "Screen":
        """A screen on standard output."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows '?' instead of ending the tour
        console = Console(highlight=False)
        known = console.is_terminal or "COLUMNS" in os.environ
        console.width = min(console.width, WIDTH) if known else WIDTH
        return cls(console, record=record)

    @property
    def terminal(self) -> bool:
        """Whether it can be written over."""
        return self.console.is_terminal

    @property
    def width(self) -> int:
        """Columns."""
        return self.console.width

    def mark(self, right: bool) -> Text:
        """A mark for right or wrong."""
        plain = self.console.options.ascii_only
        return Text(("yes" if plain else "✓") if right else ("no" if plain else "✗"), style="green" if right else "red")

    def print(self, *items: RenderableType, sep: str = " ", end: str = "\n") -> None:
        """Show something; strings may have rich's markup."""
        for console in self._consoles():
            console.print(*items, sep=sep, end=end)

    def rule(self, title: str) -> None:
        """Begin a part."""
        for console in self._consoles():
            console.rule(f"[bold]{title}", align="left", style="blue")

    @contextlib.contextmanager
    def live(self, render: Callable[[], RenderableType]) -> Iterator[Callable[[], None]]:
        """Show something that changes; off a terminal its last state only.

        Args:
            render: Makes what is shown.

        Yields:
            To be called when it has changed.
        """
        if not self.terminal:
            yield lambda: None
            self.console.print(render())
        else:
            with Live(render(), console=self.console, refresh_per_second=25) as live:
                yield lambda: live.update(render())
                live.update(render(), refresh=True)
        self._record(render())

    def raw(self, data: bytes) -> None:
        """Pass on what another program wrote for a terminal; `shown` has to be told what stays."""
        self.console.file.flush()
        os.write(self.console.file.fileno(), data)

    def shown(self, *items: RenderableType) -> None:
        """Tell the picture what `raw` left on the screen."""
        self._record(*items)

    def close(self) -> None:
        """Leave a terminal as it was: an ended program may have hidden its cursor."""
        if self.terminal:
            self.console.show_cursor()

    def save(self, file: Path, *, title: str) -> None:
        """Write everything shown as an SVG that refers to nothing outside of itself."""
        assert self._recorder is not None, "made without record"
        svg = self._recorder.export_svg(title=title, unique_id="loramux")
        svg = _FONT.sub(_FONTS, _FONT_FACE.sub("", svg))
        file.write_text(svg, encoding="utf-8")

    def _record(self, *items: RenderableType) -> None:
        if self._recorder is not None:
            self._recorder.print(*items)

    def _consoles(self) -> list[Console]:
        return [self.console] if self._recorder is None else [self.console, self._recorder]
