"""Serve the embedded base with three tenants' adapters until it is stopped: what `make serve` runs.

    python -m loramux_demo.serve --port 50051 --store .loramux-demo

Further arguments go to `loramux-server serve`. Adapters that the store has are not uploaded again. The exit status is
the server's; SIGINT and SIGTERM go on to it, which then finishes what it began; a second one ends it at once.
"""

import argparse
import os
import sys
from pathlib import Path

from loramux_demo.paths import ADAPTERS, BASE


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loramux_demo.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", default="50051", help="of the server (50051); 0 picks a free one")
    parser.add_argument("--store", type=Path, default=Path(".loramux-demo"), help="where adapters are kept")
    parser.add_argument("--base", type=Path, default=BASE, help="quantized base (the embedded one)")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="a directory a data set of tenants.TENANTS")
    options, flags = parser.parse_known_args(arguments)
    try:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported: its own lines repeat what we report
        from loramux_demo.serve_run import run

        return run(options, flags)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
