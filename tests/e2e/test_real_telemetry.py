"""What an operator sees of requests on a real engine: one trace, exact counts, and no text of any caller."""

import asyncio
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loramux import AdapterNotFound, AsyncClient, BatchRequest, ChatMessage, InvalidRequest, Usage, _tracing
from tests.e2e.otlp_collector import Collector, attributes_of
from tests.e2e.real_server import RealServer, eventually, log_entries, settled

CANARY = "canary-5d1c7e"
GENERATE = "loramux.v1.GenerationService/Generate"


class Left(NamedTuple):
    """What a caller knew of a generation when it left."""

    prompt_tokens: int
    cached_tokens: int
    received: int


@pytest.fixture
def client_spans() -> Iterator[InMemorySpanExporter]:
    """Spans of the SDK, by a provider of this test alone."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    api = _tracing._api()
    assert api is not None
    before = api.tracer
    api.tracer = provider.get_tracer("test")
    yield exporter
    api.tracer = before
    provider.shutdown()


async def test_one_request_is_one_trace(
    server: RealServer, collector: Collector, client_spans: InMemorySpanExporter
) -> None:
    async with AsyncClient(server.address) as client:
        result = await client.generate(
            [ChatMessage("user", CANARY)], adapter="v1", max_tokens=9, ignore_eos=True, request_id="trace-me"
        ).result()
    [sdk] = client_spans.get_finished_spans()
    assert sdk.context is not None
    trace_id = f"{sdk.context.trace_id:032x}"
    await eventually(lambda: len(collector.spans(trace_id)) == 2, "both spans of the server", seconds=15)
    spans = {span.kind: span for span in collector.spans(trace_id)}
    rpc, generation = spans[trace_pb2.Span.SPAN_KIND_SERVER], spans[trace_pb2.Span.SPAN_KIND_INTERNAL]
    assert rpc.name == GENERATE and rpc.parent_span_id.hex() == f"{sdk.context.span_id:016x}"
    assert generation.parent_span_id == rpc.span_id
    facts = attributes_of(generation)
    assert facts["gen_ai.response.id"] == result.generation_id
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.usage.input_tokens"] == result.usage.prompt_tokens
    assert facts["gen_ai.usage.output_tokens"] == 9
    assert str(facts["loramux.adapter.version"]).startswith("tenants/default/adapters/v1/versions/")
    assert [event.name for event in generation.events if event.name != "load"] == [
        "queue",
        "first_token",
        "prefill",
        "decode",
    ]
    assert rpc.start_time_unix_nano <= generation.start_time_unix_nano < generation.end_time_unix_nano
    logged = [entry for entry in log_entries(server) if "trace-me" in str(entry)]
    assert all(entry.get("trace_id", trace_id) == trace_id for entry in logged)


async def test_counts_equal_what_clients_saw(server: RealServer) -> None:
    names = (None, "v1", "rslora", "attention")
    await settled(server)
    before = server.metrics()
    async with AsyncClient(server.address) as client:

        async def complete(index: int) -> Usage:
            n = 2 if index % 20 == 1 else 1
            result = await client.generate(
                random.Random(500 + index % 50).choices(range(3, 500), k=20),
                adapter=names[index % 4],
                max_tokens=1 + index % 7,
                ignore_eos=True,
                n=n,
            ).result()
            assert sum(len(output.token_ids) for output in result.outputs) == n * (1 + index % 7)
            return result.usage

        async def leave(index: int) -> Left:
            leaving = client.generate(f"leave {index}", adapter=names[index % 4], max_tokens=500, ignore_eos=True)
            async with leaving as stream:
                received = len((await anext(aiter(stream))).token_ids)
                return Left(stream.started.prompt_tokens, stream.started.cached_tokens, received)

        async def refused() -> None:
            with pytest.raises(AdapterNotFound):
                await client.generate("x", adapter="nobody").result()

        jobs = [complete(index) if index % 10 else leave(index) for index in range(200)]
        results = await asyncio.gather(*jobs, *[refused() for _ in range(5)])
    usages = [result for result in results if isinstance(result, Usage)]
    left = [result for result in results if isinstance(result, Left)]
    assert (len(usages), len(left)) == (180, 20)
    await settled(server)
    after = server.metrics()

    def grown(name: str, **labels: str) -> float:
        return sum(
            value - before.get(series, 0.0)
            for series, value in after.items()
            if series.split("{")[0] == name and all(f'{key}="{text}"' in series for key, text in labels.items())
        )

    calls = "loramux_rpc_calls_total"
    assert grown(calls, rpc_method=GENERATE, rpc_response_status_code="OK") == 180
    assert grown(calls, rpc_method=GENERATE, rpc_response_status_code="CANCELLED") == 20
    assert grown(calls, rpc_method=GENERATE, loramux_reason="ADAPTER_NOT_FOUND") == 5
    assert grown(calls, rpc_method=GENERATE) == 205
    assert grown("rpc_server_call_duration_seconds_count", rpc_method=GENERATE) == 205
    assert grown("loramux_generations_total", outcome="finished") == 180
    assert grown("loramux_generations_total", outcome="cancelled") == 20
    assert grown("loramux_generations_total", outcome="failed") == 0
    assert grown("loramux_sequences_finished_total", reason="length") == 190, "ten of them had two sequences"
    assert grown("gen_ai_server_request_duration_seconds_count") == 200
    assert grown("gen_ai_server_time_to_first_token_seconds_count") == 180
    tokens = "loramux_tokens_total"
    assert grown(tokens, type="input", outcome="finished") == sum(usage.prompt_tokens for usage in usages)
    assert grown(tokens, type="output", outcome="finished") == sum(usage.output_tokens for usage in usages)
    assert grown(tokens, type="cached", outcome="finished") == sum(usage.cached_tokens for usage in usages)
    assert grown(tokens, type="input", outcome="cancelled") == sum(one.prompt_tokens for one in left)
    assert grown(tokens, type="cached", outcome="cancelled") == sum(one.cached_tokens for one in left)
    assert grown(tokens, type="output", outcome="cancelled") >= sum(one.received for one in left)
    assert grown(tokens, type="output", outcome="cancelled") < 20 * 500, "they did not run on"


async def test_no_text_of_a_caller_is_kept(server: RealServer, collector: Collector) -> None:
    async with AsyncClient(server.address) as client:
        echo = (await client.tokenize(CANARY)).token_ids
        await client.detokenize(echo)
        bias = {"max_tokens": 4, "stop": [f"stop {CANARY}"], "bad_words": [f"bad {CANARY}"]}
        await client.generate(f"Say {CANARY}", **bias).result()
        chat = [ChatMessage("system", CANARY), ChatMessage("user", CANARY)]
        await client.generate(chat, adapter="v1", **bias).result()
        async with client.generate(f"Leave {CANARY}", max_tokens=300, ignore_eos=True) as stream:
            await anext(aiter(stream))
        for wrong in ({"temperature": 99.0}, {"stop": [CANARY * 40]}, {"max_tokens": 10**6}, {"n": 99}):
            with pytest.raises(InvalidRequest) as caught:
                await client.generate(f"Refuse {CANARY}", **wrong).result()
            assert CANARY not in str(caught.value)
        items = [BatchRequest(f"Item {CANARY}"), BatchRequest(CANARY * 10, adapter="nobody")]
        errors = [item.error async for item in client.batch_generate(items) if item.error]
        assert len(errors) == 1 and CANARY not in str(errors[0])
        marker = await client.generate("the last one", max_tokens=1).result()
    await eventually(lambda: bool(collector.attributes(marker.generation_id)), "everything was exported", seconds=15)
    assert not collector.contains(CANARY)
    assert CANARY not in server.http("/metrics")
    lines = list(server.log)
    assert lines and all(line.startswith("{") for line in lines), "a log of JSON lines alone"
    assert not [line for line in lines if CANARY in line]
