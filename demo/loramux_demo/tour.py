"""The guided tour behind `make demo`: one server, one quantized base, several tenants' adapters.

    python -m loramux_demo.tour

Everything on the screen is what the server answered just now; nothing is recorded, nothing waits on purpose. Exit
status: 0 the tour ran to its end, 1 it could not (one sentence says why), 2 usage, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import sys
from pathlib import Path

from loramux_demo.paths import ADAPTERS, BASE


def main(arguments: list[str] | None = None) -> int:
    """Run the tour."""
    parser = argparse.ArgumentParser(
        prog="python -m loramux_demo.tour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-training", action="store_true", help="leave out the part that trains a new adapter")
    parser.add_argument("--base", type=Path, default=BASE, help="quantized base (the embedded one)")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="a directory a data set of tenants.TENANTS")
    parser.add_argument("--record", type=Path, metavar="FILE.svg", help="also write what was shown as a picture")
    options = parser.parse_args(arguments)
    try:
        # Here, so that Ctrl-C while these modules load ends in one line as well.
        from loramux_demo.tour_run import run

        return run(options)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
