"""Many streams on the real engine: cancelled ones leave nothing behind; hot swap and prefix cache change no answer."""

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path

from loramux import AsyncClient, FinishReason, GenerationResult
from tests.e2e.real_server import RealServer, settled

NAMES = (None, "v1", "attention", "rslora", "pattern")


def token_prompt(seed: int, length: int = 12) -> list[int]:
    """Random token ids; another seed shares no prefix."""
    return random.Random(seed).choices(range(3, 500), k=length)


async def greedy(client: AsyncClient, prompt: list[int], adapter: str | None, max_tokens: int) -> GenerationResult:
    """A greedy answer of exactly `max_tokens` tokens."""
    stream = client.generate(prompt, adapter=adapter, temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return await stream.result()


async def references(client: AsyncClient, adapter: str, version: str) -> int:
    """Requests that use a version at the moment."""
    residency = (await client.adapters.get_version(adapter, version)).residency
    assert residency is not None, "the replica tells"
    return residency.references


async def test_cancelled_streams_leave_nothing_behind(server: RealServer) -> None:
    async with AsyncClient(server.address) as client:
        versions: dict[str, str] = {}
        for name in NAMES:  # every adapter is on the device before the start is noted
            result = await greedy(client, token_prompt(1), name, 1)
            if name is not None and result.adapter_version is not None:
                versions[name] = result.adapter_version
        await settled(server)
        before = server.metrics()
        max_tokens = 40

        async def run(index: int) -> GenerationResult | None:
            stream = client.generate(
                token_prompt(100 + index),
                adapter=NAMES[index % len(NAMES)],
                temperature=0.0 if index % 2 else 1.0,
                max_tokens=400 if index % 10 == 0 else max_tokens,
                ignore_eos=True,
            )
            async with stream:
                if index % 10:
                    return await stream.result()
                received = 0
                async for delta in stream:
                    received += len(delta.token_ids)
                    if received >= 5:
                        return None
                raise AssertionError("it ended before it was cancelled")

        results = await asyncio.gather(*(run(index) for index in range(100)))
        complete = [result for result in results if result is not None]
        assert len(complete) == 90
        assert {len(result.token_ids) for result in complete} == {max_tokens}
        assert {result.usage.output_tokens for result in complete} == {max_tokens}
        assert {result.finish_reason for result in complete} == {FinishReason.LENGTH}

        seconds = await settled(server, seconds=5)
        print(f"seconds_to_rest: {seconds:.2f}")
        after = server.metrics()
        for unchanged in ("loramux_slab_rank_units_used", "loramux_slab_versions", "loramux_preemptions_total"):
            assert after[unchanged] == before[unchanged]
        for name, version in versions.items():
            assert await references(client, name, version) == 0
        status = await client.status()
        assert status.total is not None
        assert (status.total.running_requests, status.total.queued_requests, status.total.kv_pages_in_use) == (0, 0, 0)
        assert status.own.running_requests == status.own.queued_requests == 0


async def test_streams_finish_on_the_version_they_started_with(
    server: RealServer, fresh_server: RealServer, adapters: Mapping[str, Path]
) -> None:
    prompts = [token_prompt(200 + index, 40) for index in range(4)]
    length = 150
    async with AsyncClient(server.address) as client, AsyncClient(fresh_server.address) as fresh:
        first = await client.adapters.upload(adapters["v1"], name="swap", promote=True)
        second = await client.adapters.upload(adapters["v2"], name="swap")
        old = [client.generate(p, adapter="swap", temperature=0, max_tokens=length, ignore_eos=True) for p in prompts]
        async with old[0], old[1], old[2], old[3]:
            for stream in old:
                assert stream.started.adapter_version == first.name
                await anext(aiter(stream))
            promoted = await client.adapters.promote("swap", second)
            assert promoted.serving_version == second.name
            assert (await client.status()).own.running_requests == 4, "the swap happens under load"
            new = await asyncio.gather(*(greedy(client, prompt, "swap", 30) for prompt in prompts))
            assert {result.adapter_version for result in new} == {second.name}
            finished = [await stream.result() for stream in old]
        assert {result.adapter_version for result in finished} == {first.name}
        assert {len(result.token_ids) for result in finished} == {length}

        assert finished[0].token_ids == (await greedy(fresh, prompts[0], "v1", length)).token_ids, "as alone"
        expected = await asyncio.gather(*(greedy(fresh, prompt, "v1", length) for prompt in prompts))
        assert [result.token_ids for result in finished] == [result.token_ids for result in expected]
        again = await asyncio.gather(*(greedy(client, prompt, "swap", 30) for prompt in prompts))
        for prompt, now, later in zip(prompts, new, again, strict=True):
            alone = await greedy(fresh, prompt, "v2", 30)
            assert alone.usage.cached_tokens == 0
            assert now.token_ids == alone.token_ids == later.token_ids
            assert later.usage.cached_tokens > 0, "the new version has a cache of its own"

        back = await client.adapters.rollback("swap")
        assert back.serving_version == first.name
        rolled = await greedy(client, prompts[0], "swap", 30)
        assert rolled.adapter_version == first.name
        assert rolled.token_ids == finished[0].token_ids[:30]
        assert rolled.usage.cached_tokens > 0, "what was computed under the old version is still its own"


async def test_prefix_cache_hits_within_one_version_only(
    server: RealServer, fresh_server: RealServer, adapters: Mapping[str, Path]
) -> None:
    prompt = token_prompt(300, 70)
    async with AsyncClient(server.address) as client, AsyncClient(fresh_server.address) as fresh:
        first = await client.adapters.upload(adapters["v1"], name="cached", promote=True)
        second = await client.adapters.upload(adapters["v2"], name="cached")
        users = {
            "base": (None, None),
            "first": (f"cached@{first.digest[:16]}", "v1"),
            "second": (f"cached@{second.digest[:16]}", "v2"),
            "other adapter": ("attention", "attention"),
        }
        expected: dict[str, tuple[int, ...]] = {}
        for user, (name, same) in users.items():
            miss = await greedy(client, prompt, name, 12)
            assert miss.usage.cached_tokens == miss.started.cached_tokens == 0, f"{user} reads nobody's cache"
            expected[user] = (await greedy(fresh, prompt, same, 12)).token_ids
            assert miss.token_ids == expected[user]
        assert len(set(expected.values())) == len(users), "the adapters answer differently"
        for user, (name, _) in users.items():
            hit = await greedy(client, prompt, name, 12)
            assert hit.usage.cached_tokens == hit.started.cached_tokens == 64, f"{user} reads its own whole pages"
            assert hit.token_ids == expected[user]
        longer = await greedy(client, [*prompt, *expected["base"], 7, 8], None, 12)
        assert longer.usage.cached_tokens == 80, "the output of an earlier request is cached too"
        assert longer.token_ids == (await greedy(fresh, [*prompt, *expected["base"], 7, 8], None, 12)).token_ids
        other = await greedy(client, [4, *prompt[1:]], None, 12)
        assert other.usage.cached_tokens == 0, "the first token differs"


async def test_every_answer_is_of_the_version_that_it_names(server: RealServer, adapters: Mapping[str, Path]) -> None:
    prompt = token_prompt(400, 33)
    async with AsyncClient(server.address) as client:
        versions = [await client.adapters.upload(adapters[name], name="flips", promote=True) for name in ("v1", "v2")]
        expected = {
            version.name: (await greedy(client, prompt, f"flips@{version.digest[:16]}", 12)).token_ids
            for version in versions
        }
        assert len(set(expected.values())) == 2
        flipping = True

        async def flip() -> None:
            turn = 0
            while flipping:
                await client.adapters.promote("flips", versions[turn % 2], warm=bool(turn % 3))
                turn += 1
                await asyncio.sleep(0.01)

        flips = asyncio.create_task(flip())
        results: list[GenerationResult] = []
        for _ in range(8):
            results += await asyncio.gather(*(greedy(client, prompt, "flips", 12) for _ in range(12)))
        flipping = False
        await flips
    assert {result.adapter_version for result in results} == set(expected)
    for result in results:
        assert result.adapter_version is not None
        assert result.token_ids == expected[result.adapter_version]


async def test_a_client_that_vanishes_leaves_nothing_behind(server: RealServer) -> None:
    await settled(server)
    client = AsyncClient(server.address)
    streams = [client.generate(token_prompt(500 + i), adapter="v1", max_tokens=1500, ignore_eos=True) for i in range(8)]
    for stream in streams:
        await stream.__aenter__()
        await anext(aiter(stream))
    assert server.metric("loramux_rpc_running") == 8
    await client.close()
    await settled(server, seconds=5)
