import io
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.text import Text

from loramux_demo.tour_errors import TourError
from loramux_demo.tour_program import run_program, settled
from loramux_demo.tour_screen import WIDTH, Screen


def piped(*, record: bool = False) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(Console(file=file, width=60, highlight=False), record=record), file


def on_terminal(*, record: bool = False) -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=60, force_terminal=True, color_system="standard", highlight=False)
    return Screen(console, record=record), file


def test_a_pipe_gets_the_last_state_of_a_stream_once_and_no_control_characters() -> None:
    screen, file = piped()
    text = Text()
    with screen.live(lambda: text) as changed:
        for word in ("one ", "two ", "three"):
            text.append(word, style="red")
            changed()
    screen.rule("a part")
    screen.print("[bold]done[/bold]", screen.mark(True), screen.mark(False))
    screen.close()
    out = file.getvalue()
    assert out.count("one two") == 1 and "one two three\n" in out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)


def test_a_terminal_sees_each_state_and_gets_its_cursor_back() -> None:
    screen, file = on_terminal()
    text = Text()
    with screen.live(lambda: text) as changed:
        text.append("one ")
        changed()
        text.append("two")
    screen.close()
    assert "one two" in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h")


def test_the_picture_shows_a_stream_once_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    screen, _ = on_terminal(record=True)
    text = Text()
    with screen.live(lambda: text) as changed:
        for word in ("one ", "two ", "three"):
            text.append(word)
            changed()
    screen.print("after")
    screen.save(tmp_path / "shot.svg", title="a title")
    svg = (tmp_path / "shot.svg").read_text(encoding="utf-8")
    words = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    assert words.count("one two three") == 1 and "after" in words and "a title" in words
    assert not re.search(r"url\((?!#)|href|https?://(?!www\.w3\.org/2000/svg|www\.textualize\.io)", svg)
    assert "@font-face" not in svg


def test_a_wide_terminal_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert Screen.standard(record=False).width == WIDTH
    monkeypatch.setenv("COLUMNS", "70")
    assert Screen.standard(record=False).width == 70


@pytest.mark.parametrize(
    ("written", "stays"),
    [
        ("plain", "plain"),
        ("one\rtwo\r", "two"),
        ("\r\x1b[2Ktraining 1/9\r\x1b[2Ktraining 9/9", "training 9/9"),
        ("\x1b[?25l\x1b[32mgreen\x1b[0m\x1b[?25h", "\x1b[32mgreen\x1b[0m"),
    ],
)
def test_what_stays_of_a_line_that_is_drawn_over(written: str, stays: str) -> None:
    assert settled(written) == stays


PROGRAM = "import sys; print('first'); print('second', file=sys.stderr); sys.exit(int(sys.argv[1]))"


async def test_a_program_shows_both_of_its_outputs() -> None:
    screen, file = piped()
    await run_program(screen, [sys.executable, "-u", "-c", PROGRAM, "0"], what="it")
    assert file.getvalue() == "first\nsecond\n"


async def test_a_program_that_fails_gives_its_last_line_as_the_reason() -> None:
    screen, _ = piped()
    with pytest.raises(TourError, match=r"^it failed: second$"):
        await run_program(screen, [sys.executable, "-u", "-c", PROGRAM, "3"], what="it")


async def test_no_stack_trace_of_a_program_is_shown() -> None:
    screen, file = piped()
    with pytest.raises(TourError, match=r"^it failed: ZeroDivisionError: division by zero$"):
        await run_program(screen, [sys.executable, "-u", "-c", "print('before'); 1 / 0"], what="it")
    assert file.getvalue() == "before\n"
