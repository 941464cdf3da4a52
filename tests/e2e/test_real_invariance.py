"""`--batch-invariant`: what a request answers depends on nothing else in the batch, nor on being preempted."""

import asyncio
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from loramux import AsyncClient, GenerationResult
from tests.e2e.otlp_collector import Collector
from tests.e2e.real_server import RealServer, eventually, publish, real_server

ADAPTERS = (None, "v1", "rslora", "attention")
SHORT, LONG = 10, 80
PROMPT_TOKENS = 20


@pytest.fixture(scope="module")
def invariant_server(
    checkpoint: Path, adapters: Mapping[str, Path], collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """32 short sequences fit into its pages, 32 long ones do not."""
    with real_server(
        checkpoint,
        tmp_path_factory.mktemp("invariant") / "store",
        "--batch-invariant",
        "--kv-pages",
        "96",
        "--otlp-endpoint",
        collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as running:
        publish(running, adapters, "v1", "rslora", "attention")
        yield running


async def _answer(client: AsyncClient, index: int, max_tokens: int) -> GenerationResult:
    """Request `index` of 32: adapters and greedy or seeded sampling in turn, each with a prompt of its own."""
    sampling = {"temperature": 0.0} if index % 2 else {"temperature": 1.2, "top_p": 0.95, "seed": 1000 + index}
    return await client.generate(
        random.Random(index).choices(range(3, 500), k=PROMPT_TOKENS),
        adapter=ADAPTERS[index // 2 % len(ADAPTERS)],
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=2,
        **sampling,
    ).result()


def _facts(
    result: GenerationResult, count: int
) -> list[tuple[int, float | None, tuple[tuple[int, float | None], ...]]]:
    """Tokens, their log-probabilities and those of the most probable ones, to the last bit."""
    return [
        (position.token.token_id, position.token.logprob, tuple((top.token_id, top.logprob) for top in position.top))
        for position in result.outputs[0].logprobs[:count]
    ]


async def test_answers_are_the_same_alone_in_company_and_after_preemption(
    invariant_server: RealServer, collector: Collector
) -> None:
    probes = range(24, 32)  # the newest requests are the ones that are preempted
    async with AsyncClient(invariant_server.address) as client:
        alone = {index: await _answer(client, index, LONG) for index in probes}
        assert len({result.token_ids for result in alone.values()}) == len(probes)

        assert invariant_server.metric("loramux_preemptions_total") == 0
        company = await asyncio.gather(*(_answer(client, index, SHORT) for index in range(32)))
        for index in probes:
            assert _facts(company[index], SHORT) == _facts(alone[index], SHORT), f"request {index} among 31 others"
        assert invariant_server.metric("loramux_preemptions_total") == 0

        crowded = await asyncio.gather(*(_answer(client, index, LONG) for index in range(32)))
        assert {len(result.token_ids) for result in crowded} == {LONG}
        for index in probes:
            assert _facts(crowded[index], LONG) == _facts(alone[index], LONG), f"request {index} when pages are short"
        assert invariant_server.metric("loramux_preemptions_total") > 0
        spans = [result.generation_id for result in (crowded[index] for index in probes)]
        await eventually(lambda: all(collector.attributes(span) for span in spans), "spans arrived", seconds=15)
        assert any(collector.attributes(span)["loramux.preemptions"] for span in spans), "a probe was preempted itself"
