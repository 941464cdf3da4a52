"""The bench's scripts import one another as neighbours, as Python finds them when one of them is run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "bench"))
