"""A server that is short of everything: requests wait, are refused or are computed again, and answers stay the same."""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loramux import (
    AdapterNotFound,
    AsyncClient,
    BatchRequest,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    RetryPolicy,
    SamplingParams,
)
from tests.e2e.real_server import RealServer, eventually, publish, real_server, settled

NAMES = ("v1", "v2", "attention", "rslora")
QUEUED, RUNNING = 12, 8


@pytest.fixture(scope="module")
def cramped(
    checkpoint: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """Two adapters fit into its slab, three sequences into its pages; its second prefill runs out of memory."""
    flags = {
        "--kv-pages": 24,
        "--rank-units": 2,
        "--max-rank": 16,
        "--max-slots": 2,
        "--max-batch-tokens": 32,
        "--max-queued": QUEUED,
        "--max-running": RUNNING,
    }
    with real_server(
        checkpoint,
        tmp_path_factory.mktemp("cramped") / "store",
        *[text for flag, value in flags.items() for text in (flag, str(value))],
        LORAMUX_FAULT="oom_prefill:2",
    ) as running:
        publish(running, adapters, *NAMES)
        yield running


def _client(server: RealServer) -> AsyncClient:
    return AsyncClient(server.address, retry=RetryPolicy(max_attempts=1))


def _prompt(seed: int, length: int = 40) -> list[int]:
    return random.Random(700 + seed).choices(range(3, 500), k=length)


async def test_more_adapters_than_the_slab_holds(cramped: RealServer, fresh_server: RealServer) -> None:
    async with _client(cramped) as client, _client(fresh_server) as fresh:
        jobs = [(NAMES[index % len(NAMES)], _prompt(index)) for index in range(12)]
        answers = await asyncio.gather(
            *(client.generate(p, adapter=n, temperature=0, max_tokens=60, ignore_eos=True).result() for n, p in jobs)
        )
        expected = await asyncio.gather(
            *(fresh.generate(p, adapter=n, temperature=0, max_tokens=60, ignore_eos=True).result() for n, p in jobs)
        )
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert [answer.adapter_version for answer in answers] == [answer.adapter_version for answer in expected]
    await settled(cramped)
    assert cramped.metric("loramux_adapter_evictions_total") > 0
    assert cramped.metric("loramux_slab_rank_units_used") <= 2
    assert "out of memory in a step" in cramped.log_text(), "the fault point was reached, and no caller saw it"


async def test_a_full_queue_refuses_and_the_others_are_served(cramped: RealServer) -> None:
    async with _client(cramped) as client:
        outcomes = await asyncio.gather(
            *(client.generate(_prompt(i), max_tokens=40, ignore_eos=True).result() for i in range(60)),
            return_exceptions=True,
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        kinds = Counter((type(error), getattr(error, "reason", "")) for error in refused)
        assert set(kinds) == {(Overloaded, "QUEUE_FULL")}
        served = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(served) >= QUEUED
        assert {result.usage.output_tokens for result in served} == {40}
        for error in refused:
            assert isinstance(error, LoramuxError) and error.retry_after is not None and str(QUEUED) in error.message
    await settled(cramped)


async def test_what_can_never_fit_is_refused_at_once(cramped: RealServer) -> None:
    async with _client(cramped) as client:
        assert (await client.model()).max_model_len == 24 * 16
        with pytest.raises(InvalidRequest, match="384") as caught:
            await client.generate(_prompt(1, 384), max_tokens=1).result()
        assert caught.value.reason == "PROMPT_TOO_LONG"
        with pytest.raises(InvalidRequest, match="n: 8 sequences") as sequences:
            await client.generate(_prompt(1, 100), max_tokens=100, n=8).result()
        assert sequences.value.reason == "INVALID_PARAMETER"
        assert (await client.generate(_prompt(1, 100), max_tokens=284, ignore_eos=True).result()).usage.output_tokens


async def test_a_deleted_adapter_serves_what_it_has_begun(cramped: RealServer, adapters: Mapping[str, Path]) -> None:
    async with _client(cramped) as client:
        version = await client.adapters.upload(adapters["pattern"], name="leaving", promote=True)
        async with client.generate("x", adapter="leaving", max_tokens=250, ignore_eos=True) as stream:
            await anext(aiter(stream))
            await client.adapters.delete("leaving")
            with pytest.raises(AdapterNotFound):
                await client.generate("x", adapter="leaving", max_tokens=1).result()
            result = await stream.result()
        assert result.adapter_version == version.name
        assert len(result.token_ids) == 250
        await settled(cramped)
        again = await client.adapters.upload(adapters["pattern"], name="leaving", promote=True)
        assert again.name == version.name, "equal bytes are the same version"
        later = await client.generate("x", adapter="leaving", max_tokens=1, ignore_eos=True).result()
        assert later.adapter_version == version.name


async def test_uploads_survive_the_death_of_the_worker(cramped: RealServer, adapters: Mapping[str, Path]) -> None:
    worker = cramped.child("loramux_server.lora.worker")
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    await eventually(lambda: cramped.child("loramux_server.lora.worker") != worker, "gone")
    async with _client(cramped) as client:
        version = await client.adapters.upload(adapters["v2"], name="after", promote=True)
        result = await client.generate("x", adapter="after", max_tokens=2, ignore_eos=True).result()
    assert result.adapter_version == version.name
    assert cramped.child("loramux_server.lora.worker") not in (None, worker)


async def test_a_batch_larger_than_the_queue_waits_in_its_call(cramped: RealServer) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    requests = [
        BatchRequest(_prompt(i, 20), item_id=str(i), adapter=NAMES[i % 4], sampling=sampling) for i in range(5 * QUEUED)
    ]
    async with _client(cramped) as client:
        items = [item async for item in client.batch_generate(requests, window=240)]
    assert {item.item_id for item in items} == {request.item_id for request in requests}
    assert {len(item.unwrap().token_ids) for item in items} == {6}
    await settled(cramped)
