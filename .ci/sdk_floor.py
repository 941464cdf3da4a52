"""Installs the built wheel without extras in empty environments and uses the SDK there.

Once with the lowest versions that pyproject.toml allows, once with the newest that the index has: both must import,
generate against a small server, and bring neither torch nor anything else of ours (sdk_smoke.py). The wheel of the demo
is built and looked into as well: base and adapters belong inside.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 1_000_000
MAX_DEMO_BYTES = 20_000_000
DEMO_FILES = (
    "base/model.safetensors",
    *(f"adapters/{name}/adapter_model.safetensors" for name in ("acme", "globex", "initech-v1", "initech-v2")),
)
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


def build(source: Path, work: Path, *, most: int) -> Path:
    """Build a wheel; end this program if it is larger than it may be."""
    run(sys.executable, "-m", "build", "--wheel", "--outdir", work, source, cwd=work)
    wheel = max(work.glob("*.whl"), key=lambda path: path.stat().st_mtime_ns)
    size = wheel.stat().st_size
    if size > most:
        raise SystemExit(f"{wheel.name} has {size} bytes, the limit is {most}")
    print(f"{wheel.name}: {size} bytes")
    return wheel


def check_demo(wheel: Path) -> None:
    """End this program if base or adapters are missing, or if something of this machine came along."""
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = [name for name in DEMO_FILES if f"loramux_demo/{name}" not in names]
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")
    if stray := [name for name in names if name.endswith((".loramux-digests.json", ".pyc"))]:
        raise SystemExit(f"{wheel.name} has {', '.join(stray)}")


def main() -> None:
    """Build the wheel, then try it at both ends of the ranges."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        check_demo(build(ROOT / "demo", work, most=MAX_DEMO_BYTES))
        wheel = build(ROOT, work, most=MAX_WHEEL_BYTES)
        for name, pins in (("lowest", floors()), ("newest", [])):
            home = work / name
            venv.create(home, with_pip=True)
            python = home / "bin" / "python"
            run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, *pins, cwd=work)
            run(python, "-W", "error", SMOKE, cwd=work)


if __name__ == "__main__":
    main()
