"""Ends of processes: the engine's, the front end's, and an orderly one."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loramux import AsyncClient, LoramuxError, RetryPolicy, ServerState, StreamInterrupted, Unavailable
from tests.e2e.real_server import RealServer, alive, children_of, eventually, real_server, settled

PROMPT = "The quick brown fox"
LONG = 1500


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of these tests."""
    return tmp_path_factory.mktemp("victim") / "store"


@pytest.fixture(scope="module")
def victim(checkpoint: Path, store: Path) -> Iterator[RealServer]:
    """A server that these tests end."""
    with real_server(checkpoint, store, "--kv-pages", "768") as running:
        yield running


async def _run_to_the_end(client: AsyncClient, index: int, begun: asyncio.Semaphore) -> LoramuxError:
    """The error that a long stream ends with."""
    with pytest.raises(LoramuxError) as caught:
        async with client.generate(f"{PROMPT} {index}", max_tokens=LONG, ignore_eos=True) as stream:
            await anext(aiter(stream))
            begun.release()
            async for _ in stream:
                pass
    return caught.value


async def test_streams_end_when_the_engine_is_killed_and_the_server_serves_again(victim: RealServer) -> None:
    async with AsyncClient(victim.address, retry=RetryPolicy(max_attempts=1)) as client:
        before = (await client.generate(PROMPT, temperature=0, max_tokens=16, ignore_eos=True).result()).token_ids
        engine = victim.engine
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(_run_to_the_end(client, index, begun)) for index in range(20)]
        for _ in streams:
            await begun.acquire()
        killed = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        errors = await asyncio.wait_for(asyncio.gather(*streams), 5)
        print(f"seconds_to_unavailable: {time.monotonic() - killed:.2f}")
        for error in errors:
            assert isinstance(error, StreamInterrupted)
            assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_UNAVAILABLE")
            assert error.tokens_received > 0
        await eventually(lambda: victim.metric("loramux_rpc_running") == 0, "all calls ended", seconds=5)
        assert (await client.status()).state is ServerState.ENGINE_RESTARTING

        with pytest.raises(Unavailable) as refused:
            await client.generate(PROMPT, max_tokens=1).result()
        assert refused.value.reason == "ENGINE_UNAVAILABLE"
        assert refused.value.retry_after is not None
        assert victim.http("/livez")

        await eventually(lambda: _ready(victim), "ready again", seconds=90)
        result = await client.generate(PROMPT, temperature=0, max_tokens=16, ignore_eos=True).result()
        print(f"seconds_to_serving: {time.monotonic() - killed:.2f}")
        assert result.token_ids == before
        assert victim.engine != engine
        assert (await client.status()).state is ServerState.SERVING
        await settled(victim)
        assert victim.metric("loramux_generations_total", outcome="failed") == 20


async def test_sigterm_lets_streams_finish_and_a_successor_goes_on(
    victim: RealServer, checkpoint: Path, store: Path, adapters: Mapping[str, Path]
) -> None:
    async with AsyncClient(victim.address, retry=RetryPolicy(max_attempts=1)) as client:
        await client.adapters.upload(adapters["v2"], name="kept", promote=True)
        kept = await client.generate(PROMPT, adapter="kept", temperature=0, max_tokens=16, ignore_eos=True).result()
        await eventually(lambda: bool(_blobs(store, kept.adapter_version)), "rows written for the successor")
        children = children_of(victim.process.pid)
        assert len(children) == 2, "engine and worker"
        streams = [client.generate(f"{PROMPT} {i}", max_tokens=400, ignore_eos=True) for i in range(4)]
        async with streams[0], streams[1], streams[2], streams[3]:
            for stream in streams:
                await anext(aiter(stream))
            victim.terminate()
            await eventually(lambda: not _ready(victim), "not ready any more")
            with pytest.raises(Unavailable) as refused:
                await client.generate(PROMPT, max_tokens=1).result()
            results = [await stream.result() for stream in streams]
        assert refused.value.reason == "DRAINING"
        assert [result.usage.output_tokens for result in results] == [400] * 4
    assert await asyncio.to_thread(victim.wait) == 0
    assert not [pid for pid in children if alive(pid)], "no child is left"
    assert "Traceback" not in victim.log_text()

    with real_server(checkpoint, store, "--kv-pages", "256") as server:
        async with AsyncClient(server.address, retry=RetryPolicy(max_attempts=1)) as client:
            again = await client.generate(
                PROMPT, adapter="kept", temperature=0, max_tokens=16, ignore_eos=True
            ).result()
            assert (again.adapter_version, again.token_ids) == (kept.adapter_version, kept.token_ids)
            await client.adapters.delete("kept")
            await eventually(
                lambda: not _blobs(store, kept.adapter_version), "a deleted adapter leaves with all its files"
            )
            await _check_that_children_end_with_their_parent(server, client, adapters["v1"])


async def _check_that_children_end_with_their_parent(server: RealServer, client: AsyncClient, adapter: Path) -> None:
    await client.adapters.upload(adapter, name="bot")  # so that the worker runs as well
    children = children_of(server.process.pid)
    assert len(children) == 2
    async with client.generate(PROMPT, max_tokens=LONG, ignore_eos=True) as stream:
        await anext(aiter(stream))
        server.kill()
        with pytest.raises(StreamInterrupted):
            async for _ in stream:
                pass
    seconds = await eventually(lambda: not any(alive(pid) for pid in children), "all children gone", seconds=10)
    print(f"seconds_to_orphans_gone: {seconds:.2f}")


def _blobs(store: Path, version: str) -> list[Path]:
    """The serving blob of a version, which may be named by the first digits of its digest."""
    return list((store / "objects").glob(f"*/{version.rpartition('/')[2]}*/serving.slab"))


def _ready(server: RealServer) -> bool:
    """Whether the probe listener says that it is ready."""
    try:
        return bool(server.http("/readyz"))
    except OSError:
        return False
