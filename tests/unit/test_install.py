"""`.ci/install.py`, which runs before anything is installed; nothing here is fetched or installed."""

import importlib.util
import io
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loramux_install", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def index() -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/torch/" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


Choose = Callable[..., tuple[str, str]]


@pytest.fixture
def choose(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Choose:
    def chosen(wanted: str = "auto", *, driver: bool = False, platform: str = "linux", cpu_index: str = "") -> object:
        monkeypatch.setattr(install, "has_nvidia_driver", lambda: driver)
        monkeypatch.setattr(install, "CPU_INDEX", cpu_index)
        monkeypatch.setattr(install, "PROBE_SECONDS", 0.3)
        monkeypatch.setattr(sys, "platform", platform)
        return install.choose_index(wanted)

    return chosen  # type: ignore[return-value]


def test_without_a_driver_the_cpu_build_comes_from_its_index(choose: Choose, index: str) -> None:
    assert choose(cpu_index=index) == (index, "cpu")


def test_with_a_driver_and_on_other_systems_the_default_index_is_taken(choose: Choose, index: str) -> None:
    assert choose(driver=True, cpu_index=index) == ("", "cuda")
    assert choose(platform="darwin", cpu_index=index) == ("", "cpu")


def test_an_index_that_was_named_is_taken_unasked(choose: Choose) -> None:
    assert choose("http://127.0.0.1:1/whl/cpu") == ("http://127.0.0.1:1/whl/cpu", "cpu")
    assert choose("") == ("", "unknown")


def test_an_index_that_does_not_answer_is_left_out_and_that_is_said(
    choose: Choose, silent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for dead in (silent, "http://127.0.0.1:1", "http://name.invalid"):
        assert choose(cpu_index=dead) == ("", "unknown")
        (line,) = capsys.readouterr().out.splitlines()
        assert dead in line and "does not answer" in line


@pytest.mark.parametrize(("build", "extras"), [("cpu", "server,trainer"), ("cuda", "server,trainer,cuda")])
def test_what_compiles_on_a_card_comes_with_torchs_cuda_build(
    build: str, extras: str, install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(install, "choose_index", lambda wanted: ("", build))
    monkeypatch.setattr(install, "ensure_venv", lambda venv: None)
    monkeypatch.setattr(install, "announce", lambda *arguments: None)
    monkeypatch.setattr(install, "run_pip", lambda command, log: ran.append(command))
    install.install("demo", tmp_path, "auto")
    [command] = ran
    assert f"{SCRIPT.parents[1]}[{extras}]" in command


def test_a_python_without_venv_is_named_with_the_package(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(install.SetupError, match=r"apt install python3-venv"):
        install.ensure_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_a_full_disk_is_seen_before_anything_is_fetched(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(install.SetupError, match=r"1\.0 GB of disk are free"):
        install.announce("demo", tmp_path, "", "cpu")
    assert "190 MB of torch" in capsys.readouterr().out


def test_downloads_are_told_and_everything_is_logged(install: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "Collecting torch==2.13.0\n",
        "  Downloading https://index/whl/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (191.8 MB)\n",
        "Downloading idna-3.20-py3-none-any.whl (70 kB)\n",
        "Installing collected packages: torch\n",
        "ERROR: it broke\n",
    ]
    log = io.StringIO()
    tail = install.show_downloads(lines, log)
    assert log.getvalue() == "".join(lines) and tail[-1] == "ERROR: it broke"
    assert capsys.readouterr().out.splitlines() == [
        "setup: 192 MB so far, now torch (191.8 MB)",
        "setup: writing files",
    ]


def test_pip_that_fails_is_one_sentence_with_its_log(install: ModuleType, tmp_path: Path) -> None:
    program = "print('ERROR: No matching distribution'); print('more'); raise SystemExit(1)"
    with pytest.raises(install.SetupError, match=r"^pip failed: No matching distribution \(all it said is in .*log\)$"):
        install.run_pip([sys.executable, "-c", program], tmp_path / "log")
    assert "more" in (tmp_path / "log").read_text()
