"""Faults on the device, seen from the other side of the wire: who is told what, and what everybody else gets."""

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grpc
import pytest

from loramux import (
    AdapterIncompatible,
    AsyncClient,
    GenerationResult,
    LoramuxError,
    Overloaded,
    RetryPolicy,
    StreamInterrupted,
)
from loramux.v1 import generation_pb2 as pb
from loramux.v1 import generation_pb2_grpc
from tests.e2e.real_server import RealServer, at_rest, eventually, log_entries, publish, real_server, settled

# Token ids that no other prompt holds: of prompts that never fit, and of prompts whose output does not.
LARGE, LARGE_LATER = 505, 506
NAMES = (None, "v1", "rslora", "attention")
STREAMS = 24
FLAGS = ("--batch-invariant", "--kv-pages", "100", "--max-batch-tokens", "64")

Facts = list[list[tuple[int, float | None]]]


@pytest.fixture(scope="module")
def sound(
    checkpoint: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """A server on which nothing goes wrong but the numbers of one adapter."""
    from tests.support.tiny_models import make_adapter

    root = tmp_path_factory.mktemp("sound")
    broken = make_adapter(root / "broken", checkpoint, rank=4, seed=9, scale=1e30)
    with real_server(checkpoint, root / "store", *FLAGS) as running:
        publish(running, {**adapters, "broken": broken}, "v1", "rslora", "attention", "broken")
        yield running


@pytest.fixture(scope="module")
def short_of_memory(
    checkpoint: Path, adapters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """A server on a device that has no room for steps of more than 12 tokens, nor for two kinds of requests at all."""
    with real_server(
        checkpoint,
        tmp_path_factory.mktemp("short") / "store",
        *FLAGS,
        LORAMUX_FAULT=f"oom_above:12,oom_prompt:{LARGE},oom_output:{LARGE_LATER}",
    ) as running:
        publish(running, adapters, "v1", "rslora", "attention")
        yield running


def _client(server: RealServer) -> AsyncClient:
    return AsyncClient(server.address, retry=RetryPolicy(max_attempts=1))


def _prompt(seed: int, length: int, *marks: int) -> list[int]:
    return [*marks, *random.Random(4000 + seed).choices(range(3, 500), k=length)]


async def _answer(client: AsyncClient, index: int) -> GenerationResult:
    """Request `index` of 24: base and adapters, greedy and seeded, one choice and two, prompts of 3 to 49 tokens."""
    sampling = {"temperature": 0.0} if index % 2 else {"temperature": 1.1, "top_p": 0.95, "seed": 70 + index}
    return await client.generate(
        _prompt(index, 3 + 2 * index),
        adapter=NAMES[index // 2 % len(NAMES)],
        n=1 + (index % 5 == 0),
        max_tokens=12,
        ignore_eos=True,
        logprobs=0,
        **sampling,
    ).result()


def _facts(results: Sequence[GenerationResult]) -> list[Facts]:
    """Token ids and log-probabilities of every choice of every result, to the last bit."""
    return [
        [
            [(position.token.token_id, position.token.logprob) for position in output.logprobs]
            for output in result.outputs
        ]
        for result in results
    ]


@pytest.fixture(scope="module")
def expected(sound: RealServer) -> list[Facts]:
    """What the requests give where nothing goes wrong."""

    async def answers() -> list[GenerationResult]:
        async with _client(sound) as client:
            return await asyncio.gather(*(_answer(client, index) for index in range(STREAMS)))

    facts = _facts(asyncio.run(answers()))
    assert all(len(choice) == 12 for choices in facts for choice in choices)
    return facts


async def _failure(client: AsyncClient, prompt: list[int], adapter: str | None) -> tuple[LoramuxError, int]:
    """The error of a stream that must fail, and the tokens that came before it."""
    received = 0
    with pytest.raises(LoramuxError) as caught:
        async with client.generate(prompt, adapter=adapter, temperature=0, max_tokens=40, ignore_eos=True) as stream:
            async for delta in stream:
                received += len(delta.token_ids)
    return caught.value, received


async def test_what_never_fits_ends_alone_in_one_error(short_of_memory: RealServer, expected: list[Facts]) -> None:
    server = short_of_memory
    failed = server.metric("loramux_generations_total", outcome="failed")
    async with _client(server) as client:
        others = [asyncio.create_task(_answer(client, index)) for index in range(STREAMS)]
        victims = await asyncio.gather(
            _failure(client, _prompt(90, 40, LARGE), None),
            _failure(client, _prompt(91, 7, LARGE), "v1"),
            _failure(client, [LARGE], None),
            _failure(client, _prompt(92, 30, LARGE_LATER), "rslora"),
        )
        results = await asyncio.gather(*others)
        for error, _ in victims:
            assert type(error) is Overloaded
            assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
            assert error.retry_after is not None and "for this request alone" in error.message
        assert [received for _, received in victims] == [0, 0, 0, 1]
        assert _facts(results) == expected
        await settled(server)
        assert server.metric("loramux_generations_total", outcome="failed") - failed == len(victims)
        assert "out of memory in a step" in server.log_text()

        await _check_that_nothing_is_held(server, client)
        for index in (3, 10):  # what is in the prefix cache by now is right, too
            assert _facts([await _answer(client, index)]) == [expected[index]]


async def _check_that_nothing_is_held(server: RealServer, client: AsyncClient) -> None:
    assert not any(at_rest(server.metrics()).values())
    for name in filter(None, NAMES):
        version = (await client.generate([5], adapter=name, max_tokens=1).result()).adapter_version
        assert version is not None
        residency = (await client.adapters.get_version(name, version)).residency
        assert residency is not None and residency.references == 0
    # All pages at once: a request that needs every one of them is served.
    pages = int(server.metric("loramux_kv_pages_limit"))
    longest = await client.generate(_prompt(93, 16 * pages - 20), max_tokens=20, ignore_eos=True).result()
    assert longest.usage.output_tokens == 20


async def test_the_error_is_the_last_thing_on_the_wire(short_of_memory: RealServer) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=_prompt(94, 20, LARGE_LATER)),
        sampling=pb.SamplingParams(max_tokens=9, ignore_eos=True),
    )
    kinds: list[str | None] = []
    async with grpc.aio.insecure_channel(short_of_memory.address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in call:
                kinds.append(event.WhichOneof("event"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert kinds == ["started", "delta"]


async def test_numbers_that_are_not_finite_end_alone(sound: RealServer, expected: list[Facts]) -> None:
    async with _client(sound) as client:
        others = [asyncio.create_task(_answer(client, index)) for index in range(STREAMS)]
        victims = await asyncio.gather(*(_failure(client, _prompt(95 + k, 5 + 30 * k), "broken") for k in range(2)))
        assert _facts(await asyncio.gather(*others)) == expected
        for error, received in victims:
            assert type(error) is AdapterIncompatible and received == 0
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "ADAPTER_NUMERICS")
        await settled(sound)
        again, _ = await _failure(client, _prompt(95, 5), "broken")
        assert again.reason == "ADAPTER_NUMERICS", "nothing of it went into the prefix cache"


async def test_a_broken_device_ends_the_engine_and_the_next_one_serves(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = tmp_path_factory.mktemp("doomed") / "store"
    with real_server(checkpoint, store, "--kv-pages", "64", LORAMUX_FAULT="device_assert:40") as server:
        async with _client(server) as client:
            short = (await client.generate(_prompt(97, 9), temperature=0, max_tokens=9).result()).token_ids
            for number in (1, 2):
                engine = server.engine
                errors = await asyncio.gather(*(_failure(client, _prompt(98 + k, 9), None) for k in range(3)))
                for error, received in errors:
                    assert type(error) is StreamInterrupted and 0 < received < 40
                    assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_UNAVAILABLE")
                await eventually(lambda: _ready(server), "ready again", seconds=90)
                assert server.engine != engine
                ends = [line for line in server.log if f"engine {number} ended with exit code 1" in line]
                assert len(ends) == 1
                again = await client.generate(_prompt(97, 9), temperature=0, max_tokens=9).result()
                assert again.token_ids == short
        messages = [str(entry["message"]) for entry in log_entries(server)]
        stacks = [message for message in messages if message.startswith("the engine failed\n")]
        assert len(stacks) == 2 and all("device-side assert triggered" in stack for stack in stacks)


def _ready(server: RealServer) -> bool:
    """Whether the probe listener says that it is ready."""
    try:
        return bool(server.http("/readyz"))
    except OSError:
        return False
