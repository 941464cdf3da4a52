"""Makes .venv and installs this tree into it: `python3 .ci/install.py demo|dev`.

`demo` leaves the development tools out. Before anything is fetched it says what and about how much. On Linux without an
NVIDIA driver torch's CPU build is taken from an index of its own, if that index answers. Standard library only, because
it runs before anything is installed.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"demo": "server,trainer", "dev": "server,trainer,dev,otel"}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
AUTO = "auto"
PROBE_SECONDS = 3.0
# Wheels of constraints.txt on Linux x86-64, Python 3.11: torch and what only its CUDA build needs, then all the rest.
TORCH_MB = {"cpu": 190, "cuda": 2900}
DISK_GB = {"cpu": 2, "cuda": 8, "unknown": 2}
REST_MB = {"demo": 190, "dev": 230}
_SHOWN_MB = 20
_DOWNLOAD = re.compile(r"^\s*Downloading (?:\S*/)?([^\s/]+)-[0-9]\S* \(([0-9.]+) (kB|MB|GB)\)")
_MB = {"kB": 0.001, "MB": 1.0, "GB": 1000.0}


def main() -> int:
    """Command line; one sentence and status 1 when something is in the way, 130 on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=EXTRAS, help="what to install")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (.venv)")
    parser.add_argument(
        "--torch-index",
        default=AUTO,
        help=f"extra package index for torch; empty: the default index only; {AUTO}: {CPU_INDEX} on Linux without an "
        "NVIDIA driver",
    )
    options = parser.parse_args()
    try:
        install(options.kind, options.venv, options.torch_index)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


class SetupError(Exception):
    """What is in the way, and the way out."""


def install(kind: str, venv: Path, torch_index: str) -> None:
    """Make the environment if needed and install into it.

    Raises:
        SetupError: It cannot be done.
    """
    index, build = choose_index(torch_index)
    ensure_venv(venv)
    announce(kind, venv, index, build)
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off"]
    if index:
        command += ["--extra-index-url", index]
    # The kernels that are compiled on the card need what no CPU does.
    extras = f"{EXTRAS[kind]},cuda" if build == "cuda" else EXTRAS[kind]
    command += ["-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extras}]", "-e", str(ROOT / "demo")]
    run_pip(command, venv / f"install-{kind}.log")


def choose_index(wanted: str) -> tuple[str, str]:
    """Extra index for torch (empty for none), and the build that comes: `cpu`, `cuda` or `unknown`."""
    if wanted != AUTO:
        return wanted, "cpu" if wanted.rstrip("/").endswith("cpu") else "unknown"
    if sys.platform != "linux":
        return "", "cpu"
    if has_nvidia_driver():
        return "", "cuda"
    if answers(f"{CPU_INDEX}/torch/", PROBE_SECONDS):
        return CPU_INDEX, "cpu"
    print(f"setup: {CPU_INDEX} does not answer within {PROBE_SECONDS:g} s; going on with pip's own configuration")
    return "", "unknown"


def has_nvidia_driver() -> bool:
    """Whether this Linux machine has one, also under WSL."""
    places = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(Path(place).exists() for place in places) or shutil.which("nvidia-smi") is not None


def answers(url: str, seconds: float) -> bool:
    """Whether a page of an index can be fetched in time; name resolution counts, which no socket timeout bounds."""
    found: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=seconds) as answer:
                found.append(answer.status == 200)
        except (OSError, ValueError):  # URLError is an OSError
            found.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return found == [True]


def ensure_venv(venv: Path) -> None:
    """Make the environment unless it is there and has pip.

    Raises:
        SetupError: This Python cannot.
    """
    python = venv / "bin" / "python"
    if python.exists() and _quiet([str(python), "-m", "pip", "--version"]).returncode == 0:
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments; on Debian and Ubuntu `apt install python3-venv` (or "
            f"python{version}-venv) adds what is missing, elsewhere the package of Python's venv module"
        )
    made = _quiet([sys.executable, "-m", "venv", "--clear", str(venv)])
    if made.returncode:
        last = (made.stdout.strip() or "no output").splitlines()[-1]
        raise SetupError(f"`{sys.executable} -m venv {venv}` failed: {last}")


def announce(kind: str, venv: Path, index: str, build: str) -> None:
    """Say what comes, from where and how much; nothing has been fetched yet.

    Raises:
        SetupError: The disk is too full.
    """
    if (
        _quiet([str(venv / "bin" / "python"), "-c", "import importlib.metadata as m; m.version('torch')"]).returncode
        == 0
    ):
        print(f"setup: torch is in {venv.name} already; the rest is at most {REST_MB[kind]} MB to download")
        return
    rest = REST_MB[kind]
    torch = {
        "cpu": f"about {TORCH_MB['cpu']} MB of torch (its CPU build)",
        "cuda": f"about {TORCH_MB['cuda']} MB of torch and CUDA",
        "unknown": f"about {TORCH_MB['cpu']} MB of torch, or {TORCH_MB['cuda']} MB where the index has its CUDA build "
        "only (TORCH_INDEX=URL names another one)",
    }[build]
    source = index or "pip's configured index"
    print(
        f"setup: downloads {torch} from {source}, and about {rest} MB of other packages, into {venv.name}: "
        f"{DISK_GB[build]} GB of disk",
        flush=True,
    )
    free = shutil.disk_usage(venv).free / 1e9
    if free < DISK_GB[build]:
        raise SetupError(f"{free:.1f} GB of disk are free at {venv}, {DISK_GB[build]} GB are needed; make room")


def run_pip(command: list[str], log: Path) -> None:
    """Run pip, showing what it downloads; all it says goes into a log.

    Raises:
        SetupError: It failed.
    """
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        assert process.stdout is not None
        try:
            tail = show_downloads(process.stdout, file)
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    if status:
        reason = next((line for line in tail if line.startswith("ERROR:")), tail[-1] if tail else "no output")
        raise SetupError(f"pip failed: {reason.removeprefix('ERROR:').strip()} (all it said is in {log})")


def show_downloads(lines: Iterable[str], log: TextIO) -> list[str]:
    """Copy pip's lines into a log and tell of the downloads: a line that changes on a terminal, else the large ones.

    Args:
        lines: Of pip.
        log: Text file.

    Returns:
        The last lines.
    """
    terminal = sys.stdout.isatty()
    total = 0.0
    tail: list[str] = []
    shown = ""
    for line in lines:
        log.write(line)
        tail = [*tail[-40:], line.rstrip()]
        if match := _DOWNLOAD.match(line):
            size = float(match[2]) * _MB[match[3]]
            total += size
            shown = f"setup: {total:.0f} MB so far, now {match[1]} ({match[2]} {match[3]})"
        elif line.startswith("Installing collected packages"):
            shown = "setup: writing files"
        else:
            continue
        if terminal:
            print(f"\r\x1b[2K{shown[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif not match or size >= _SHOWN_MB:
            print(shown, flush=True)
    if terminal and shown:
        print("\r\x1b[2K", end="", flush=True)
    return tail


def _quiet(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


if __name__ == "__main__":
    sys.exit(main())
