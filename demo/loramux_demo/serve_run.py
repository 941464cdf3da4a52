"""Runs the demo's server: starts it, brings the adapters, passes signals on."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from loramux import AsyncClient, LoramuxError
from loramux_demo.embedded import check_embedded, publish_embedded
from loramux_demo.tour_errors import TourError
from loramux_demo.tour_server import DemoServer

_TEXT = """\
loramux serving on {address}: the base, acme (JSON), globex (German), initech (v1 of two house styles).
Ask it from another terminal, in {python}:

from loramux import ChatMessage, Client
client = Client("{address}").with_adapter("acme")
print(client.generate([ChatMessage("user", "What is the capital of Austria?")], temperature=0).result().text)

Ctrl-C ends it.
"""


def run(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Serve until the server ends.

    Args:
        options: Of `serve.main`.
        flags: Further flags of `loramux-server serve`.

    Returns:
        The server's exit status; 1 if it could not be brought up or the adapters could not be brought onto it.
    """
    try:
        check_embedded(options.base, options.adapters)
        return asyncio.run(_serve(options, flags))
    except (TourError, LoramuxError, OSError) as error:
        sys.stderr.write(f"serve: {' '.join(str(error).split())}\n")
        return 1


async def _serve(options: argparse.Namespace, flags: Sequence[str]) -> int:
    server = DemoServer(options.base, options.store, flags=("--port", options.port, "--grace", "5", *flags))
    asked = asyncio.Event()

    def forward(number: int) -> None:
        asked.set()
        server.signal(number)

    loop = asyncio.get_running_loop()
    for number, sent in (
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM),
    ):
        loop.add_signal_handler(number, forward, sent)
    try:
        async with server:
            async with AsyncClient(server.address) as client:
                await publish_embedded(client, options.adapters)
            sys.stdout.write(_TEXT.format(address=server.address, python=_interpreter()))
            sys.stdout.flush()
            return await server.wait()
    except (TourError, LoramuxError):
        if asked.is_set():  # it was told to end before it served, or before all adapters were there
            return await server.wait()
        raise


def _interpreter() -> str:
    """The Python that has the SDK, as short as it can be written from here."""
    return min(os.path.relpath(sys.executable), sys.executable, key=len)
