"""A server that cannot start says why in one line, with exit code 2, and leaves nothing behind."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.real_server import RealServer, command, environment

EXIT_USAGE = 2
SECONDS = 100


async def _start(*flags: str) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error of a server that does not start."""
    process = await asyncio.create_subprocess_exec(
        *command("--port", "0", *flags),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    try:
        async with asyncio.timeout(SECONDS):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode(), errors.decode()


def _check(outcome: tuple[int | None, str, str], *parts: str) -> None:
    code, output, errors = outcome
    assert code == EXIT_USAGE, errors
    assert output == ""
    assert "Traceback" not in errors
    plain = [line for line in errors.splitlines() if line and not line.startswith("{")]
    assert len(plain) == 1 and plain[0].startswith("loramux-server: "), errors
    for part in parts:
        assert part in plain[0], plain[0]


async def test_settings_that_cannot_be_used(checkpoint: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(f"model: {checkpoint}\nmax_runing: 3\n")
    twice = tmp_path / "broken.yaml"
    twice.write_text("model: [")
    missing = str(tmp_path / "nowhere")
    a_file = tmp_path / "file"
    a_file.write_text("not a directory")
    model = ("--model", str(checkpoint))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        store = ("--store", str(tmp_path / "store"))
        outcomes = [
            await _start("--config", str(unknown)),
            await _start("--config", str(twice)),
            await _start("--model", missing, *store),
            await _start(*model, "--store", str(a_file)),
            await _start(*model, "--store", str(a_file / "below")),
            await _start(*model, *store, "--adapters", missing),
            await _start(*model, *store, "--port", port),
            await _start(*model, *store, "--probe", f"127.0.0.1:{port}"),
        ]
    _check(outcomes[0], "unknown.yaml:2", "max_runing", "max_running")
    _check(outcomes[1], "broken.yaml", "YAML")
    _check(outcomes[2], "--model", missing)
    _check(outcomes[3], "--store", str(a_file))
    _check(outcomes[4], "--store", str(a_file))
    _check(outcomes[5], "--adapters", missing, "No such file or directory")
    _check(outcomes[6], "--port", port)
    _check(outcomes[7], "--probe", port)


async def test_a_store_that_cannot_be_written(checkpoint: Path) -> None:
    """Root may write anywhere but below /proc, where nobody can."""
    _check(await _start("--model", str(checkpoint), "--store", "/proc/loramux-store"), "--store", "/proc/loramux-store")


async def test_a_second_server_on_the_same_store(server: RealServer, checkpoint: Path) -> None:
    flags = server.process.args
    assert isinstance(flags, list)
    store = str(flags[flags.index("--store") + 1])
    _check(await _start("--model", str(checkpoint), "--store", store), "--store", store)
    assert server.http("/readyz")


@pytest.mark.parametrize("case", ["architecture", "weights"])
async def test_models_that_cannot_be_served(checkpoint: Path, tmp_path: Path, case: str) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    if case == "architecture":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(
            json.dumps({**config, "model_type": "mamba", "architectures": ["MambaForCausalLM"]})
        )
        parts: tuple[str, ...] = ("mamba",)
    else:
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        parts = ("model.safetensors",)
    flags = ("--weights", "fp32", "--device", "cpu", "--no-self-test", "--store", str(tmp_path / "store"))
    _check(await _start("--model", str(model), *flags), *parts)


def test_flags_are_checked_before_anything_is_started(checkpoint: Path, tmp_path: Path) -> None:
    cases: Mapping[str, tuple[str, ...]] = {
        "--max-rank": ("--max-rank", "17"),
        "--host": ("--host", "0.0.0.0"),  # noqa: S104 - it is refused
        "--weights": ("--weights", "int3"),
        "--kv-pages": ("--kv-pages", "many"),
    }
    for flag, flags in cases.items():
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            command("--model", str(checkpoint), "--store", str(tmp_path / "store"), *flags),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        _check((done.returncode, done.stdout, done.stderr), flag)
    assert not (tmp_path / "store").exists()
