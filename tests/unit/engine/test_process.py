"""The engine process behind its socket, with the fake runner."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from loramux_server.engine.config import EngineConfig
from loramux_server.engine.frames import FrameDecoder, encode_frame
from loramux_server.engine.messages import (
    Add,
    Command,
    CommandFrame,
    Done,
    Event,
    EventFrame,
    PutVersion,
    Ready,
    SamplingSpec,
    Shutdown,
    Started,
    Tokens,
)
from tests.support.engine_driver import version
from tests.support.fake_runner import solo_output

ROOT = Path(__file__).parents[3]


class Process:
    """An engine process and what it says."""

    def __init__(self, *, fault: str | None = None, **config: object) -> None:
        ours, theirs = socket.socketpair()
        settings = EngineConfig(**{"model": "fake", "epoch": 7, **config})  # type: ignore[arg-type]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "server")])}
        if fault is not None:
            environment["LORAMUX_FAULT"] = fault
        self.child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.fake_engine",
                "--fd",
                str(theirs.fileno()),
                "--config",
                msgspec.json.encode(settings).decode(),
            ],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        self.socket = ours
        self.socket.settimeout(60)
        self.decoder: FrameDecoder[EventFrame] = FrameDecoder(EventFrame)
        self.events: list[Event] = []
        self.frames: list[EventFrame] = []

    def send(self, *commands: Command) -> None:
        self.socket.sendall(encode_frame(CommandFrame(commands=list(commands))))

    def read(self) -> bool:
        data = self.socket.recv(1 << 16)
        for frame in self.decoder.feed(data):
            assert frame.epoch == 7 and frame.step == len(self.frames)
            self.frames.append(frame)
            self.events.extend(frame.events)
        return bool(data)

    def until(self, reached: Callable[[Event], bool]) -> Event:
        seen = 0
        while True:
            for event in self.events[seen:]:
                if reached(event):
                    return event
            seen = len(self.events)
            assert self.read(), "the engine closed the socket"

    def done(self, request_id: str) -> Done:
        event = self.until(lambda event: isinstance(event, Done) and event.request_id == request_id)
        assert isinstance(event, Done)
        return event

    def tokens(self, request_id: str) -> list[int]:
        mine = [event for event in self.events if isinstance(event, Tokens) and event.request_id == request_id]
        return [token for event in mine for token in event.token_ids]

    def exit(self) -> tuple[int, list[dict[str, object]]]:
        _, stderr = self.child.communicate(timeout=60)
        return self.child.returncode, [json.loads(line) for line in stderr.splitlines()]


@contextlib.contextmanager
def engine(*, fault: str | None = None, **config: object) -> Iterator[Process]:
    process = Process(fault=fault, **config)
    try:
        yield process
    finally:
        process.socket.close()
        process.child.kill()
        process.child.communicate()


def add(request_id: str, *, max_tokens: int = 4, version: str | None = None) -> Add:
    return Add(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingSpec(max_tokens=max_tokens),
        version=version,
    )


def test_serves_and_shuts_down() -> None:
    with engine() as process:
        ready = process.until(lambda event: isinstance(event, Ready))
        assert process.events == [ready]
        process.send(PutVersion(spec=version("v")), add("base"), add("adapted", version="v"))
        assert process.done("base").status == process.done("adapted").status == "finished"
        sampling = SamplingSpec(max_tokens=4)
        assert process.tokens("base") == solo_output([1, 2, 3], sampling, "", 0)
        assert process.tokens("adapted") == solo_output([1, 2, 3], sampling, "/v", 0)
        process.send(add("long", max_tokens=500), Shutdown(), add("late"))
        assert process.done("long").status == "cancelled"
        assert process.exit()[0] == 0


def test_sigterm_cancels_and_exits() -> None:
    with engine() as process:
        process.send(add("long", max_tokens=500))
        process.until(lambda event: isinstance(event, Tokens))
        process.child.send_signal(signal.SIGTERM)
        assert process.done("long").status == "cancelled"
        assert process.exit()[0] == 0


def test_sigterm_ends_an_idle_engine() -> None:
    with engine() as process:
        process.until(lambda event: isinstance(event, Ready))
        process.child.send_signal(signal.SIGINT)
        process.child.send_signal(signal.SIGTERM)
        assert process.exit()[0] == 0


def test_sigterm_during_start_ends_it_at_once() -> None:
    with engine(model="slow") as process:
        assert process.child.stderr is not None
        assert b"building" in process.child.stderr.readline()
        process.child.send_signal(signal.SIGTERM)
        assert process.exit()[0] == -signal.SIGTERM


def test_parents_death_during_start_ends_it() -> None:
    with engine(model="slow") as process:
        # What waits on the socket is no reason to end; that nobody holds its other end is.
        process.send(add("early"))
        assert process.child.stderr is not None
        assert b"building" in process.child.stderr.readline()
        process.socket.close()
        code, log = process.exit()
        assert code == 0 and "given up" in str(log[-1]["message"])


@pytest.mark.parametrize("busy", [True, False])
def test_parents_death_ends_it(busy: bool) -> None:
    with engine() as process:
        process.until(lambda event: isinstance(event, Ready))
        if busy:
            process.send(add("long", max_tokens=500))
            process.until(lambda event: isinstance(event, Started))
        process.socket.close()
        assert process.exit()[0] == 0


def test_failed_step_is_loud() -> None:
    with engine(fault="die_after_steps:3") as process:
        process.send(add("victim", max_tokens=50))
        while process.read():
            pass
        assert len(process.tokens("victim")) == 3
        code, log = process.exit()
        assert code == 1
        assert any(line["level"] == "WARNING" and "fault points are on" in str(line["message"]) for line in log)
        assert log[-1]["level"] == "CRITICAL" and "die_after_steps" in str(log[-1]["stack"])


def test_startup_error_reaches_the_parent() -> None:
    with engine(model="missing") as process:
        code, log = process.exit()
        assert code == 3
        assert log[-1] == {"startup_error": {"type": "CheckpointMissing", "message": "config.json is missing"}}


def test_broken_framing_ends_it() -> None:
    with engine() as process:
        process.until(lambda event: isinstance(event, Ready))
        process.socket.sendall(b"\xff\xff\xff\xff")
        code, log = process.exit()
        assert code == 1 and "exceeds" in str(log[-1]["stack"])


def test_a_slow_reader_gets_every_token() -> None:
    with engine(kv_pages=2000, max_running=64) as process:
        process.until(lambda event: isinstance(event, Ready))
        process.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        names = [f"r{index}" for index in range(32)]
        process.send(*(add(name, max_tokens=300) for name in names))
        process.until(lambda event: isinstance(event, Started))
        for name in names:
            assert process.done(name).output_tokens == 300
            assert process.tokens(name) == solo_output([1, 2, 3], SamplingSpec(max_tokens=300), "", 0)
        sizes = [len(event.token_ids) for event in process.events if isinstance(event, Tokens)]
        assert sum(sizes) == 32 * 300
