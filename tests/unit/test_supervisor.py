"""Restart, back-off, the crash-loop limit, and an engine that does not go."""

import asyncio
import socket
from collections.abc import Sequence

import pytest

from loramux_server import supervisor as module
from loramux_server.engine import messages as wire
from loramux_server.rpc.engine_client import EngineClient
from loramux_server.supervisor import CrashLoop, RestartPolicy, Supervisor
from tests.support.scripted_engine import ScriptedEngines


class Stubborn:
    """An engine process that never says a word and goes only when killed."""

    def __init__(self) -> None:
        self.sock, self.peer = socket.socketpair()
        self.startup_error: str | None = None
        self.killed = 0
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def started(self) -> None:
        raise AssertionError("it is never ready")

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        self.killed += 1
        self.peer.close()
        if not self._exit.done():
            self._exit.set_result(-9)


async def nothing(*_: object) -> None:
    pass


def supervise(launch: object, policy: RestartPolicy, resync: Sequence[wire.Command] = ()) -> Supervisor:
    return Supervisor(
        EngineClient(),
        launch,  # type: ignore[arg-type]
        prepare=nothing,
        resync=lambda: resync,
        on_serving=nothing,
        on_restart=lambda: None,
        policy=policy,
    )


def test_back_off_doubles_up_to_its_bound_and_deaths_are_counted_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    watcher = supervise(None, RestartPolicy(first_delay=1.0, longest_delay=5.0, crashes=5, window=60.0))
    assert [watcher._back_off(now, "it died") for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    with pytest.raises(CrashLoop, match="died 5 times in 60 s, the last time because it died"):
        watcher._back_off(now, "it died")
    assert watcher.crash_looping
    now += 61.0
    assert watcher._back_off(1000.0, "it died") == 1.0


async def test_the_table_is_sent_before_requests_are_accepted_to_each_engine() -> None:
    engines = ScriptedEngines()
    alias = wire.PutAlias(spec=wire.AliasSpec(alias="tenants/a/adapters/b", targets=[("v", 1.0)], revision=3))
    watcher = supervise(engines, RestartPolicy(first_delay=0.01, crashes=3), [alias])
    running = asyncio.create_task(watcher.run())
    for number in (1, 2):
        await engines.until(lambda number=number: len(engines.commands) == number)
        assert engines.commands[-1] == alias and watcher._client.serving
        if number == 1:
            engines.current.crash()
    await watcher.stop()
    await running
    assert isinstance(engines.commands[-1], wire.Shutdown) and watcher.restarts == 1


async def test_an_engine_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TERMINATE_GRACE_S", 0.05)
    engine = Stubborn()

    async def launch(epoch: int) -> Stubborn:
        return engine

    watcher = supervise(launch, RestartPolicy())
    running = asyncio.create_task(watcher.run())
    await asyncio.sleep(0.02)
    watcher._client._serving = True  # one that only starts is killed at once
    async with asyncio.timeout(5):
        await watcher.stop()
        await running
    assert engine.killed == 1


async def test_an_engine_whose_socket_ends_is_reaped_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TERMINATE_GRACE_S", 0.05)
    launched: list[Stubborn] = []

    async def launch(epoch: int) -> Stubborn:
        launched.append(Stubborn())
        launched[-1].peer.shutdown(socket.SHUT_RDWR)
        return launched[-1]

    watcher = supervise(launch, RestartPolicy(first_delay=0.01, longest_delay=0.01, crashes=3))
    async with asyncio.timeout(5):
        with pytest.raises(CrashLoop):
            await watcher.run()
    assert [engine.killed for engine in launched] == [1, 1, 1]


async def test_an_engine_that_still_starts_is_killed_without_grace() -> None:
    engine = Stubborn()

    async def launch(epoch: int) -> Stubborn:
        return engine

    watcher = supervise(launch, RestartPolicy())
    running = asyncio.create_task(watcher.run())
    await asyncio.sleep(0.02)
    async with asyncio.timeout(module._TERMINATE_GRACE_S / 2):
        await watcher.stop()
        await running
    assert engine.killed == 1 and watcher.restarts == 0


async def test_a_hung_engine_is_killed_without_grace() -> None:
    engines = ScriptedEngines()
    watcher = supervise(engines, RestartPolicy(first_delay=0.01, crashes=3))
    running = asyncio.create_task(watcher.run())
    await engines.until(lambda: watcher._client.serving)
    hung = engines.current
    watcher._client.hung = True
    watcher._client._on_end("the engine was silent")
    await engines.until(lambda: len(engines.engines) == 2 and watcher._client.serving)
    assert await hung.wait() == -9 and not watcher._client.hung
    await watcher.stop()
    await running


async def test_a_process_that_cannot_be_started_counts_as_a_death() -> None:
    engines = ScriptedEngines()
    failures = iter([OSError(24, "Too many open files"), None, *[OSError(12, "Cannot allocate memory")] * 9])

    async def launch(epoch: int) -> object:
        if (failure := next(failures)) is not None:
            raise failure
        return await engines(epoch)

    watcher = supervise(launch, RestartPolicy(first_delay=0.01, longest_delay=0.01, crashes=4))
    running = asyncio.create_task(watcher.run())
    await engines.until(lambda: watcher._client.serving)
    engines.current.crash()
    with pytest.raises(CrashLoop, match="died 4 times .* could not be started: Cannot allocate memory"):
        await running
