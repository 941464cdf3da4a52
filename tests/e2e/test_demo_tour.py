"""The demo's programs as a newcomer runs them, on a tiny random base: only what the model says is nonsense."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loramux import AsyncClient, Client
from loramux_demo.embedded import publish_embedded
from loramux_demo.paths import EMBEDDED_ADAPTERS
from tests.e2e.real_server import ROOT, alive, children_of, environment

pytestmark = pytest.mark.timeout(300)

SECONDS = 240


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loramux_server.model.quantize import quantize_checkpoint

    directory = quantize_checkpoint(checkpoint, tmp_path_factory.mktemp("demo") / "base")
    (directory / "demo.json").write_text(json.dumps({"parameters": 5_000_000}))
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loramux_base.fingerprint import base_fingerprint
    from loramux_base.manifest import FORMAT_VERSION, MANIFEST_NAME
    from tests.support.tiny_models import make_adapter

    root = tmp_path_factory.mktemp("demo-adapters")
    fingerprint = base_fingerprint(base)
    manifest = {
        "format_version": FORMAT_VERSION,
        "base_fingerprint": fingerprint.hex,
        "base_parts": dict(fingerprint.parts),
    }
    for seed, name in enumerate(EMBEDDED_ADAPTERS):
        directory = make_adapter(root / name, checkpoint, seed=seed, scale=0.05)
        (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    return root


def _environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / name) for name in ("client", "server", "trainer", "demo"))
    return environment(PYTHONPATH=path)


async def _start(module: str, *arguments: str | Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"loramux_demo.{module}", *map(str, arguments)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
        # Tests that a shell put into the background ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


async def _until(process: asyncio.subprocess.Process, text: str) -> str:
    """Read its output up to the line with a text."""
    assert process.stdout is not None
    seen = ""
    async with asyncio.timeout(SECONDS):
        while text not in seen:
            line = (await process.stdout.readline()).decode()
            assert line, f"it ended: {seen}"
            seen += line
    return seen


async def _end(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    try:
        async with asyncio.timeout(SECONDS):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode(), errors.decode()


async def test_the_whole_tour_piped(base: Path, adapters: Path, tmp_path: Path) -> None:
    picture = tmp_path / "tour.svg"
    process = await _start("tour", "--base", base, "--adapters", adapters, "--record", picture)
    code, output, errors = await _end(process)
    assert (code, errors) == (0, ""), output
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output), "plain text, no control characters"
    assert "5M-parameter demo model, to show the machinery" in output
    parts = ["1. One question", "2. initech's traffic", "traffic moves to v2", "3. A new tenant", "What ran"]
    assert [output.index(part) for part in parts] == sorted(output.index(part) for part in parts)
    digests = re.findall(r"answered by v[12], digest ([0-9a-f]{16})", output)
    assert len(digests) == 2 and digests[0] != digests[1]
    assert re.search(r"right and in hooli's form: \d+ of 20 before \(.*\), \d+ of 20\s+after", output)
    rows = re.findall(r"^│ (\S+) +│ +(\d+) │", output.partition("What ran")[2], re.M)
    counted = {name.partition("@")[0]: int(count) for name, count in rows}
    assert counted == {"base": 21, "acme": 1, "globex": 1, "hooli": 20, "initech": 1, "all": 45}
    assert sorted(name for name, _ in rows if name.startswith("initech")) == sorted(
        f"initech@{digest}" for digest in digests
    )
    assert picture.stat().st_size < 150_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_tour_leaves_nothing_behind(base: Path, adapters: Path, number: signal.Signals) -> None:
    process = await _start("tour", "--base", base, "--adapters", adapters)
    await _until(process, "server ready")
    children = children_of(process.pid)
    assert children, "its server runs"
    process.send_signal(number)
    code, _, errors = await _end(process)
    assert code == 128 + number
    assert errors.split() == (["interrupted"] if number == signal.SIGINT else [])
    assert not any(alive(pid) for pid in children)


async def test_a_tour_that_cannot_run_says_why_in_one_sentence(
    base: Path, adapters: Path, checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    cases = {
        "there is no base model": (tmp_path / "nowhere", adapters),
        "there is no adapter": (base, tmp_path),
        "the server did not start: ": (broken, adapters),
    }
    for sentence, (model, directory) in cases.items():
        code, _, errors = await _end(await _start("tour", "--base", model, "--adapters", directory))
        assert code == 1
        assert errors.startswith(f"demo: {sentence}") and errors.count("\n") == 1, errors


async def test_serving_the_demo_base(
    base: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--base", base, "--adapters", adapters, "--store", tmp_path / "store", "--port", "0")
    process = await _start("serve", *where)
    seen = await _until(process, "Ctrl-C ends it.")
    match = re.search(r"loramux serving on (\S+):", seen)
    assert match is not None
    pasted = [line for line in seen.splitlines() if line.startswith(("from loramux", "client = ", "print("))]
    assert len(pasted) == 3
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", "\n".join(pasted)],
        check=False,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr

    async def refuse(*_: object, **__: object) -> None:
        raise AssertionError("uploaded twice")

    monkeypatch.setattr("loramux._async_adapters.AsyncAdapters.upload", refuse)
    async with AsyncClient(match[1]) as client:
        versions = await publish_embedded(client, adapters)
    with Client(match[1]) as client:
        assert client.adapters.get("initech").serving_version == versions["initech-v1"].name
    process.send_signal(signal.SIGINT)
    code, _, errors = await _end(process)
    assert (code, errors) == (0, "")


async def test_serving_ends_with_the_servers_status(base: Path, adapters: Path, tmp_path: Path) -> None:
    where = ("--base", base, "--adapters", adapters, "--store", tmp_path / "store", "--port", "0")
    code, output, errors = await _end(await _start("serve", *where, "--no-such-flag"))
    assert (code, output) == (1, "")
    assert "Traceback" not in errors and errors.splitlines()[-1].startswith("serve: the server did not start")
