"""The tour's server process."""

import asyncio
import re
import sys
import time
from pathlib import Path
from typing import Self

_START_SECONDS = 120.0


class DemoServer:
    """A `loramux-server` on a free port of this machine; ends with the block.

    Args:
        model: Base directory.
        store: Where adapters go; made by the server.
    """

    def __init__(self, model: Path, store: Path) -> None:
        self._command = [
            *(sys.executable, "-m", "loramux_server", "serve", "--model", str(model), "--weights", "nf4"),
            *("--store", str(store), "--port", "0", "--log-level", "error", "--max-slots", "8", "--rank-units", "8"),
        ]
        self._process: asyncio.subprocess.Process | None = None
        self.address = ""
        self.seconds = 0.0

    async def __aenter__(self) -> Self:
        """Start it and wait until it serves.

        Raises:
            RuntimeError: It did not come up.
        """
        began = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=asyncio.subprocess.PIPE)
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), _START_SECONDS)
        match = re.search(rb"serving on (\S+)", line)
        if match is None:
            await self._stop()
            raise RuntimeError(f"the server did not start, its last line was {line.decode().strip()!r}")
        self.address = match.group(1).decode()
        self.seconds = time.monotonic() - began
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop it."""
        await self._stop()

    async def _stop(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()
