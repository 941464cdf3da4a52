"""The front end starts without what only the engine and the trainer need."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_front_end_loads_no_tensor_library() -> None:
    code = (
        "import sys, loramux_server.run, loramux_server.cli, loramux_server.hub\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'peft', 'bitsandbytes', 'triton'} & set(sys.modules)))"
    )
    path = os.pathsep.join(str(ROOT / name) for name in ("client", "server"))
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.strip() == "[]"
