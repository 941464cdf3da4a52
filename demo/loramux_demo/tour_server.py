"""The server process of the tour and of `loramux_demo.serve`."""

import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from loramux_demo.tour_errors import TourError

START_SECONDS = 180.0
_STOP_SECONDS = 20.0
_SERVING = re.compile(rb"loramux serving on (\S+)")


class DemoServer:
    """A `loramux-server` that ends with the block.

    It is in a process group of its own: Ctrl-C reaches whoever holds the block, who then ends it in order.

    Args:
        model: Base directory.
        store: Where adapters go; made by the server.
        flags: Further flags of `loramux-server serve`; later ones win.
        log: Takes what the server logs; None leaves it on stderr.

    Attributes:
        address: `host:port`, once it serves.
        seconds: What the start took.
    """

    def __init__(self, model: Path, store: Path, *, flags: Sequence[str] = (), log: Path | None = None) -> None:
        self._command = [
            *(sys.executable, "-m", "loramux_server", "serve", "--model", str(model), "--model-name", "demo"),
            *("--weights", "nf4", "--store", str(store), "--device", "cpu", "--port", "0", "--log-level", "error"),
            *("--max-slots", "8", "--rank-units", "8", *flags),
        ]
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self.address = ""
        self.seconds = 0.0

    async def __aenter__(self) -> Self:
        """Start it and wait until it serves.

        Raises:
            TourError: It did not come up.
        """
        began = time.monotonic()
        log = None if self._log is None else self._log.open("wb")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                process_group=0,
            )
        finally:
            if log is not None:
                log.close()
        try:
            await self._until_serving()
        except BaseException:
            await self.stop()
            raise
        self.seconds = time.monotonic() - began
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop it."""
        await self.stop()

    async def wait(self) -> int:
        """Wait for its end and return its exit status as a shell tells it."""
        assert self._process is not None, "enter the block first"
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def stop(self) -> None:
        """End it in order; after a while by force."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _until_serving(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), START_SECONDS)
        except TimeoutError:
            raise TourError(f"the server does not serve after {START_SECONDS:g} s{self._reason()}") from None
        match = _SERVING.search(line)
        if match is None:
            await self._process.wait()
            raise TourError(f"the server did not start{self._reason()}")
        self.address = match.group(1).decode()

    def _reason(self) -> str:
        """What its log says last, as the rest of a sentence."""
        if self._log is None:
            return ""
        reason = ""
        for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("loramux-server: "):
                reason = line.removeprefix("loramux-server: ")
            elif line.startswith("{"):
                try:
                    reason = str(json.loads(line).get("message", reason))
                except ValueError:
                    continue
        return f": {reason}" if reason else ""
