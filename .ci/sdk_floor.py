"""Installs the built wheel without extras in empty environments and uses the SDK there.

Once with the lowest versions that pyproject.toml allows, once with the newest that the index has: both must import,
generate against a small server, and bring neither torch nor anything else of ours (sdk_smoke.py).
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 1_000_000
SMOKE = ROOT / ".ci" / "sdk_smoke.py"


def floors() -> list[str]:
    """Base dependencies of pyproject.toml at their lowest versions, as pip requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = []
    for requirement in project["dependencies"]:
        match = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+),<[0-9.]+", requirement)
        if match is None:
            raise SystemExit(f"base dependency {requirement!r} is not of the form name>=floor,<ceiling")
        pins.append(f"{match[1]}=={match[2]}")
    return pins


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command; end this program with its output if it fails."""
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    if done.stdout.startswith("SDK works"):
        print(done.stdout, end="")


def main() -> None:
    """Build the wheel, then try it at both ends of the ranges."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", work, ROOT, cwd=work)
        wheel = next(work.glob("loramux-*.whl"))
        size = wheel.stat().st_size
        if size > MAX_WHEEL_BYTES:
            raise SystemExit(f"{wheel.name} has {size} bytes, the limit is {MAX_WHEEL_BYTES}")
        print(f"{wheel.name}: {size} bytes")
        for name, pins in (("lowest", floors()), ("newest", [])):
            home = work / name
            venv.create(home, with_pip=True)
            python = home / "bin" / "python"
            run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, *pins, cwd=work)
            run(python, "-W", "error", SMOKE, cwd=work)


if __name__ == "__main__":
    main()
