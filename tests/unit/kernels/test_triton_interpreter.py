"""The Triton kernels on CPU, under Triton's interpreter, in a process of their own.

The interpreter is chosen by an environment variable that Triton reads on import. What it cannot show (bfloat16
products, captured graphs, races) is in tests/gpu.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def failures() -> dict[str, list[str]]:
    """Failures of each operation, from one run of all checks."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton not installed")
    paths = [str(ROOT), str(ROOT / "server"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_interpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("operation", ["attention", "lora", "norm", "activation", "rope", "sampling"])
def test_kernel_matches_reference(failures: dict[str, list[str]], operation: str) -> None:
    assert not failures[operation], "\n".join(failures[operation])
