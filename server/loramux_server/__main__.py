"""`python -m loramux_server`, the same as `loramux-server`."""

import sys

from loramux_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
