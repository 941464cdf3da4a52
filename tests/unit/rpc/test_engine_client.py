"""Routing of events: merging for readers that lag, and frames that stay small."""

import asyncio
import itertools
import socket

import pytest

from loramux_server.engine import messages as wire
from loramux_server.errors import LoramuxServerError, Reason
from loramux_server.rpc import engine_client as module
from loramux_server.rpc.engine_client import EngineClient, _frame_length
from loramux_server.rpc.request_stream import RequestStream
from tests.support.scripted_engine import Script, ScriptedEngines


def tokens(index: int, first: int, *ids: int, top: int = 0) -> wire.Tokens:
    logprobs = [wire.TokenLogprob(logprob=-1.0, top=[(i, -1.0) for i in range(top)]) for _ in ids] if top else []
    return wire.Tokens(request_id="r", index=index, first=first, token_ids=list(ids), logprobs=logprobs)


async def test_tokens_of_a_reader_that_lags_are_merged_by_sequence() -> None:
    stream = RequestStream("r")
    for first in range(1000):
        stream.push(tokens(0, first, first, top=2))
        stream.push(tokens(1, first, first + 1, top=2))
    assert stream.pending_bytes > 64 * 1024
    events = await stream.read()
    assert [event.token_ids for event in events] == [list(range(1000)), list(range(1, 1001))]  # type: ignore[union-attr]
    assert all(len(event.logprobs) == 1000 for event in events)  # type: ignore[union-attr]
    assert stream.pending_bytes == 0
    stream.push(tokens(0, 1000, 7))
    assert [event.token_ids for event in await stream.read()] == [[7]]  # type: ignore[union-attr]
    assert events[0].token_ids == list(range(1000)), "what was read is not touched again"  # type: ignore[union-attr]


async def test_merged_events_stay_small_enough_for_a_message() -> None:
    stream = RequestStream("r")
    for first in range(10_000):
        stream.push(tokens(0, first, first))
    events = [event for event in await stream.read() if isinstance(event, wire.Tokens)]
    assert max(len(event.token_ids) for event in events) == 4096
    assert [token for event in events for token in event.token_ids] == list(range(10_000))


async def test_a_failed_stream_gives_what_waits_then_the_error() -> None:
    stream = RequestStream("r")
    stream.push(tokens(0, 0, 1))
    stream.fail(EngineClient().unavailable("it died"))
    assert len(await stream.read()) == 1
    with pytest.raises(LoramuxServerError) as error:
        await stream.read()
    assert error.value.reason is Reason.ENGINE_UNAVAILABLE
    finished = RequestStream("r")
    finished.push(wire.Done(request_id="r", status="finished"))
    finished.fail(EngineClient().unavailable("too late"))
    assert isinstance((await finished.read())[0], wire.Done)


def add(request_id: str, length: int) -> wire.Add:
    return wire.Add(request_id=request_id, prompt_token_ids=[1] * length, sampling=wire.SamplingSpec(max_tokens=1))


def test_a_frame_is_bounded_by_commands_and_tokens() -> None:
    assert _frame_length([wire.Abort(request_id="a")] * 1000) == 256
    assert _frame_length([add(str(n), 400_000) for n in range(5)]) == 2
    assert _frame_length([add("large", 5_000_000), add("next", 1)]) == 1


async def test_operations_end_with_the_answer_or_with_the_engine() -> None:
    engines = ScriptedEngines()
    engine = await engines(1)
    client = EngineClient()
    await client.attach(engine.sock, 1)
    assert (await client.wait_ready()).vocab_size == 512
    client.open([wire.PutVersion(spec=wire.VersionSpec(version="v", digest="d", path="/p"))])
    await client.preload("v")
    engines.operation_error = wire.ErrorSpec(reason="ADAPTER_SLOTS_EXHAUSTED", message="no room")
    with pytest.raises(LoramuxServerError) as refused:
        await client.unload("v")
    assert refused.value.reason is Reason.ADAPTER_SLOTS_EXHAUSTED
    assert [type(command) for command in engines.commands] == [wire.PutVersion, wire.Preload, wire.Unload]
    waiting = asyncio.create_task(client.preload("v"))
    await asyncio.sleep(0)
    engine.crash()
    assert "socket" in await client.wait_lost()
    client.detach("the engine is restarting")
    with pytest.raises(LoramuxServerError) as lost:
        await waiting
    assert lost.value.reason is Reason.ENGINE_UNAVAILABLE


async def test_a_peer_that_breaks_the_framing_is_an_engine_that_died() -> None:
    ours, theirs = socket.socketpair()
    client = EngineClient()
    await client.attach(ours, 1)
    theirs.sendall(b"\xff\xff\xff\xff garbage")
    with pytest.raises(ConnectionError, match="protocol"):
        await client.wait_ready()
    client.detach("gone")
    theirs.close()


async def test_without_an_engine_requests_are_refused_and_tables_wait_for_the_resync() -> None:
    client = EngineClient()
    with pytest.raises(LoramuxServerError, match="starting"):
        client.submit(add("a", 1))
    with pytest.raises(LoramuxServerError, match="starting"):
        await client.preload("v")
    client.put_alias(wire.AliasSpec(alias="a", targets=[], revision=1))
    assert client._outbox == []
    client.check_integrity()


async def test_an_idle_engine_that_answers_no_ping_is_hung() -> None:
    engines = ScriptedEngines()
    engines.deaf = True
    engine = await engines(1)
    client = EngineClient(hang_seconds=0.2)
    await client.attach(engine.sock, 1)
    await client.wait_ready()
    client.open([])
    async with asyncio.timeout(10):
        assert "silent for 0.2 s and answers no ping" in await client.wait_lost()
    assert client.hung
    client.detach("the engine is restarting")
    engine.kill()


async def test_an_engine_that_is_silent_with_work_in_flight_is_hung_and_one_that_is_idle_is_not() -> None:
    engines = ScriptedEngines(lambda add: Script(hold=asyncio.Event()))
    engine = await engines(1)
    client = EngineClient(hang_seconds=0.2)
    await client.attach(engine.sock, 1)
    await client.wait_ready()
    client.open([])
    lost = asyncio.create_task(client.wait_lost())
    await asyncio.sleep(0.5)
    assert not lost.done() and not client.hung, "it answers pings"
    assert any(isinstance(command, wire.Ping) for command in engines.commands)
    stream = client.submit(add("a", 1))
    for _ in range(10):
        await asyncio.sleep(0.05)
        await engine.send()
    assert not lost.done(), "it speaks"
    async with asyncio.timeout(10):
        assert "silent for 0.2 s" in await lost
    assert client.hung
    client.detach("the engine is restarting")
    with pytest.raises(LoramuxServerError):
        await stream.read()
    engine.kill()


async def test_a_retry_is_advised_for_when_the_next_engine_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    client = EngineClient()
    assert client.unavailable().retry_after == 5.0

    async def start(epoch: int, seconds: float) -> None:
        nonlocal now
        ours, theirs = socket.socketpair()
        with theirs:
            await client.attach(ours, epoch)
            now += seconds
            client.open([])
            client.detach("the engine is restarting")

    await start(1, 12.0)
    assert client.unavailable().retry_after == 12.0
    now += 4.0
    assert client.unavailable().retry_after == 8.0
    now += 60.0
    assert client.unavailable().retry_after == 1.0
    await start(2, 600.0)
    assert client.unavailable().retry_after == 30.0
    client.shutdown()
    error = client.unavailable()
    assert (error.reason, error.retry_after) == (Reason.DRAINING, 1.0)


async def test_requests_that_give_up_one_after_the_other_do_not_hide_that_the_engine_hangs() -> None:
    engine = await ScriptedEngines()(1)
    client = EngineClient(hang_seconds=0.2)
    await client.attach(engine.sock, 1)
    await client.wait_ready()

    async def ignore(command: wire.Command) -> None:
        """Hang."""

    engine._take = ignore  # type: ignore[method-assign]
    client.open([])
    lost = asyncio.create_task(client.wait_lost())
    async with asyncio.timeout(10):
        for number in itertools.count():
            stream = client.submit(add(f"r{number}", 1))
            await asyncio.wait([lost], timeout=0.05)
            client.release(stream)
            if lost.done():
                break
    assert client.hung
    client.detach("the engine is restarting")
    engine.kill()
