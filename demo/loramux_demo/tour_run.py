"""Runs the tour and turns everything that can end it into one sentence and an exit status."""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

# Before grpc is imported: its own lines repeat what we report.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from loramux import LoramuxError
from loramux_demo.embedded import check_embedded
from loramux_demo.tour_errors import TourError
from loramux_demo.tour_guide import Tour
from loramux_demo.tour_screen import Screen

TERMINATED = 143


def run(options: argparse.Namespace) -> int:
    """Run the tour as the command line asks.

    Args:
        options: Of `tour.main`.

    Returns:
        The exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C; everything that was started has ended.
    """
    screen = Screen.standard(record=options.record is not None)
    try:
        check_embedded(options.base, options.adapters)
        with tempfile.TemporaryDirectory(prefix="loramux-demo-", ignore_cleanup_errors=True) as work:
            tour = Tour(screen, Path(work), base=options.base.absolute(), adapters=options.adapters)
            asyncio.run(_until_signal(tour, train=not options.skip_training))
        if options.record is not None:
            screen.save(options.record, title="make demo")
    except asyncio.CancelledError:
        return TERMINATED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains once more
        return 1
    except (TourError, LoramuxError, OSError) as error:
        return _failed(screen, " ".join(str(error).split()))
    except Exception as error:  # noqa: BLE001 - a newcomer's first sight is no stack trace
        return _failed(screen, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        screen.close()
    return 0


async def _until_signal(tour: Tour, *, train: bool) -> None:
    """Run the tour; SIGTERM and a closed terminal cancel it, as asyncio does for Ctrl-C."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    await tour.run(train=train)


def _failed(screen: Screen, sentence: str) -> int:
    screen.console.file.flush()
    sys.stderr.write(f"demo: {sentence}\n")
    return 1
