"""Runs another program before the user's eyes: in a terminal of its own if there is one, so that it draws its bar."""

import asyncio
import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Sequence

from rich.text import Text

from loramux_demo.tour_errors import TourError
from loramux_demo.tour_screen import Screen

_ROWS = 50
_TRACE = b"Traceback (most recent call last)"
_REDRAWN = re.compile(r".*(?:\r|\x1b\[2K)", re.DOTALL)
_CURSOR = re.compile(r"\x1b\[\?25[lh]|\x1b\[[0-9]*[A-GJK]")


async def run_program(screen: Screen, command: Sequence[str], *, what: str) -> None:
    """Run a program to its end; when the task is cancelled it is killed.

    Args:
        screen: Where it shows.
        command: Program and arguments.
        what: What it does, for the error.

    Raises:
        TourError: It failed.
    """
    master, slave = pty.openpty() if screen.terminal else os.pipe()
    if screen.terminal:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, screen.width, 0, 0))
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "COLUMNS": str(screen.width), "PYTHONWARNINGS": "ignore"},
            process_group=0,
        )
    finally:
        os.close(slave)
    reading = asyncio.create_task(asyncio.to_thread(_copy, screen, master))
    try:
        lines = await asyncio.shield(reading)
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await asyncio.wait([reading])
        os.close(master)
    if status:
        said = [line for line in lines if line.strip()]
        reason = Text.from_ansi(said[-1]).plain.removeprefix("error: ") if said else f"exit status {status}"
        raise TourError(f"{what} failed: {reason}")


def _copy(screen: Screen, source: int) -> list[str]:
    """Show what comes until the program ends; the lines that stay on the screen."""
    lines: list[str] = []
    rest = b""
    broken = False
    while data := _read(source):
        if screen.terminal and not broken:
            screen.raw(data.partition(_TRACE)[0])
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            lines.append(settled(line.decode("utf-8", "replace")))
            broken = broken or line.startswith(_TRACE)
            if broken:  # its last line is the reason; the stack is nothing for this screen
                continue
            if screen.terminal:
                screen.shown(Text.from_ansi(lines[-1]))
            else:
                screen.print(Text.from_ansi(lines[-1]))
    return lines


def _read(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # so Linux tells that nobody holds the terminal's other end any more
        return b""


def settled(line: str) -> str:
    """What remains of a line that was drawn over several times, without the movements of the cursor."""
    return _CURSOR.sub("", _REDRAWN.sub("", line.removesuffix("\r")))
