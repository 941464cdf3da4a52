"""mypy --strict over a program that uses the SDK, and over one that misuses it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'loramux[dev]'")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MISUSE = """
from loramux import Client, SamplingParams
client = Client("localhost:1")
client.generate("x", temprature=1.0)
client.generate("x", temperature="hot")
client.generate(5)
SamplingParams(1.0)
client.model().name = "other"
"""


def mypy(path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}", str(path)]
    env = {"MYPYPATH": str(ROOT / "client"), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, cwd=cache, env=env)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_a_program_is_checked_strictly(cache: Path) -> None:
    done = mypy(HERE / "typing_sample.py", cache)
    ours = [line for line in done.stdout.splitlines() if "typing_sample.py" in line]
    assert not ours, "\n".join(ours)


def test_misuse_is_found(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "misuse.py"
    path.write_text(MISUSE)
    found = [line for line in mypy(path, cache).stdout.splitlines() if "misuse.py" in line and "error" in line]
    lines = {int(line.split(":")[1]) for line in found}
    assert lines == {4, 5, 6, 7, 8}
