"""Real processes: signals, deaths, and what is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from loramux.v1 import generation_pb2 as pb
from loramux.v1 import generation_pb2_grpc
from loramux_server.engine.messages import SamplingSpec
from tests.support.fake_runner import solo_output
from tests.support.front_end import write_base

ROOT = Path(__file__).resolve().parents[2]
PROMPT = [5, 6, 7]


class Server:
    """A server process."""

    def __init__(self, root: Path, *settings: str) -> None:
        self.log = root / "log"
        path = os.pathsep.join(str(ROOT / name) for name in ("client", "server", "."))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fake_engine_server", str(root), *settings],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "GRPC_VERBOSITY": "NONE"},
                cwd=ROOT,
            )

    def stub(self) -> generation_pb2_grpc.GenerationServiceStub:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line.startswith("loramux serving on 127.0.0.1:"), self.log.read_text()
        return generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(line.split()[-1]))

    def engine(self) -> int:
        (found,) = [pid for pid in children(self.process.pid) if b"fake_runner" in command_line(pid)]
        return found


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def request(max_tokens: int = 10, **sampling: object) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=3, **sampling)  # type: ignore[arg-type]
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=params)


def tokens(events: Iterator[pb.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    return tmp_path


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def begin(*settings: str) -> Server:
        servers.append(Server(root, *settings))
        return servers[-1]

    yield begin
    for server in servers:
        left = children(server.process.pid) if server.process.poll() is None else []
        server.process.kill()
        server.process.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert server.process.stdout is not None
        server.process.stdout.close()


def test_engine_death_restart_and_a_drain_that_loses_nothing(start: Callable[..., Server]) -> None:
    server = start()
    stub = server.stub()
    expected = tokens(stub.Generate(request(60), timeout=20))
    assert len(expected) == 60

    stream = stub.Generate(request(400), timeout=30)
    next(stream)
    first = server.engine()
    os.kill(first, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as error:
        tokens(stream)
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE and time.monotonic() - began < 5

    def served() -> bool:
        try:
            return tokens(stub.Generate(request(60), timeout=20)) == expected
        except grpc.RpcError as failed:
            assert failed.code() is grpc.StatusCode.UNAVAILABLE
            return False

    until(served)
    second = server.engine()
    assert second != first

    streams = [stub.Generate(request(300), timeout=30) for _ in range(4)]
    for stream in streams:
        next(stream)
    server.process.send_signal(signal.SIGTERM)
    assert [len(tokens(stream)) for stream in streams] == [300] * 4
    assert server.process.wait(20) == 0
    assert not alive(second)
    assert "Traceback" not in server.log.read_text()


def test_the_engine_follows_a_killed_front_end(start: Callable[..., Server]) -> None:
    server = start()
    server.stub()
    engine = server.engine()
    server.process.kill()
    until(lambda: not alive(engine), seconds=5)


def test_a_second_signal_ends_at_once(start: Callable[..., Server]) -> None:
    server = start("grace=60")
    stub = server.stub()
    stream = stub.Generate(request(450), timeout=60)
    next(stream)
    engine = server.engine()
    server.process.send_signal(signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    until(lambda: not alive(engine), seconds=5)
    with contextlib.suppress(grpc.RpcError):
        tokens(stream)


def test_a_startup_error_of_the_engine_is_one_line(start: Callable[..., Server]) -> None:
    server = start("kv_pages=7")
    assert server.process.wait(30) == 2
    lines = server.log.read_text().splitlines()
    assert lines == ["loramux-server: 7 pages do not hold one request; raise --kv-pages"]


def test_output_is_what_the_engine_alone_gives(start: Callable[..., Server]) -> None:
    stub = start().stub()
    spec = SamplingSpec(max_tokens=20, seed=3, ignore_eos=True)
    assert tokens(stub.Generate(request(20), timeout=20)) == solo_output(PROMPT, spec, "", 0)
