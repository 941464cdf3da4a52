"""What an operator sees of requests: exact counts, spans of one trace, ids in logs, and no text of any caller."""

import asyncio
import io
import json
import logging
from pathlib import Path

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loramux.v1 import generation_pb2 as pb
from loramux_server.engine.messages import Stats
from loramux_server.telemetry.json_log import JsonFormatter
from tests.support.front_end import FrontEnd, front_end, text_request
from tests.support.scripted_engine import Script, ScriptedEngines

CANARY = "canary-f3b1"
STATS = Stats(
    waiting=2,
    running=3,
    kv_pages_used=64,
    kv_pages_cached=10,
    kv_pages_total=256,
    prefix_hit_tokens=100,
    prefix_query_tokens=400,
    rank_units_used=4,
    rank_units_total=64,
    resident_versions=2,
    adapter_loads=5,
    adapter_evictions=1,
    preemptions=1,
    steps=10,
    step_seconds={"forward": 1.5, "sample": 0.25},
    prefill_tokens=500,
    decode_tokens=80,
    requests_finished=7,
    requests_cancelled=1,
    requests_failed=0,
)


async def http(server: FrontEnd, path: str, method: str = "GET") -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.app.probe_port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


async def test_counts_equal_what_clients_saw(tmp_path: Path) -> None:
    async with front_end(tmp_path, probe="127.0.0.1:0") as server:
        answer = server.tokens("the quick brown fox")
        server.engines.script = lambda add: Script(
            token_ids=answer if add.sampling.seed else [70] * 400, pause_after=None if add.sampling.seed else 3
        )
        prompt_tokens = output_tokens = 0

        async def complete() -> None:
            nonlocal prompt_tokens, output_tokens
            usage = (await server.generate(text_request(CANARY, seed=1)))[-1].usage
            prompt_tokens += usage.prompt_tokens
            output_tokens += usage.output_tokens

        async def leave() -> None:
            call = server.generation.Generate(text_request(CANARY, seed=0))
            await call.read()
            await call.read()
            call.cancel()

        async def refused() -> None:
            with pytest.raises(grpc.aio.AioRpcError):
                await server.generate(text_request(CANARY, temperature=-1))

        await asyncio.gather(
            *[complete() for _ in range(90)], *[leave() for _ in range(10)], *[refused() for _ in range(5)]
        )
        await server.assert_at_rest()
        status, text = await http(server, "/metrics")
        assert status == 200 and CANARY not in text
        method = "loramux.v1.GenerationService/Generate"
        calls = "loramux_rpc_calls_total"
        assert server.metric(calls, rpc_method=method, rpc_response_status_code="OK") == 90
        assert server.metric(calls, rpc_method=method, rpc_response_status_code="CANCELLED") == 10
        refusals = {"rpc_response_status_code": "INVALID_ARGUMENT", "loramux_reason": "INVALID_PARAMETER"}
        assert server.metric(calls, **refusals) == 5
        assert server.metric("rpc_server_call_duration_seconds_count", rpc_method=method) == 105
        assert server.metric("gen_ai_server_request_duration_seconds_count") == 100
        assert server.metric("gen_ai_server_time_to_first_token_seconds_count") == 90
        assert server.metric("gen_ai_server_time_per_output_token_seconds_count") == 90
        assert server.metric("loramux_generations_total", outcome="finished") == 90
        assert server.metric("loramux_generations_total", outcome="cancelled") == 10
        assert server.metric("loramux_sequences_finished_total", reason="length") == 90
        assert server.metric("loramux_tokens_total", type="input", outcome="finished") == prompt_tokens
        finished = server.metric("loramux_tokens_total", type="output", outcome="finished")
        assert finished == output_tokens == 90 * len(answer)
        assert 10 <= server.metric("loramux_tokens_total", type="output", outcome="cancelled") <= 30
        assert server.metric("loramux_rpc_running") == 0 and server.metric("loramux_requests_queued") == 0


async def test_engine_statistics_are_exported_and_survive_a_restart(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        await server.engines.current.send(STATS)
        await server.engines.until(lambda: server.app.engine.stats is not None)
        assert server.metric("loramux_kv_usage_ratio") == 0.25 == server.metric("vllm:kv_cache_usage_perc")
        assert server.metric("vllm:num_requests_waiting") == 2 and server.metric("vllm:num_requests_running") == 3
        assert server.metric("loramux_requests_waiting") == 2 and server.metric("loramux_requests_running") == 3
        assert server.metric("loramux_engine_step_time_seconds_total", part="forward") == 1.5
        assert server.metric("loramux_prefix_cache_hit_tokens_total") == 100
        server.engines.current.crash()
        await server.engines.until(lambda: len(server.engines.engines) == 2)
        await server.app.ready.wait()
        await server.engines.current.send(STATS)
        await server.engines.until(lambda: server.metric("loramux_engine_steps_total") == 20)
        assert server.metric("loramux_engine_step_time_seconds_total", part="sample") == 0.5


@pytest.mark.parametrize("sampled", ["00", "01"])
async def test_one_request_gives_two_spans_of_the_callers_trace(tmp_path: Path, sampled: str) -> None:
    exporter = InMemorySpanExporter()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    options = {"span_processor": SimpleSpanProcessor(exporter)}
    engines = ScriptedEngines(lambda add: Script(version="tenants/default/adapters/bot/versions/" + "ab" * 32))
    async with front_end(tmp_path, engines, app_options=options) as server:
        await server.generate(
            text_request(CANARY, stop=[CANARY]),
            metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-{sampled}"),),
        )
        await server.assert_at_rest()
        generation, rpc = exporter.get_finished_spans()
        assert f"{rpc.context.trace_id:032x}" == trace_id == f"{generation.context.trace_id:032x}"
        assert generation.parent is not None and generation.parent.span_id == rpc.context.span_id
        assert generation.attributes["gen_ai.usage.output_tokens"] == 3
        assert [event.name for event in generation.events] == ["queue", "load", "first_token", "prefill", "decode"]
        assert rpc.attributes["rpc.response.status_code"] == "OK"
        assert CANARY not in rpc.to_json() + generation.to_json()


async def test_no_text_of_a_caller_reaches_the_log_even_when_we_fail(tmp_path: Path) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    try:
        async with front_end(tmp_path) as server:
            answer = server.tokens(CANARY)
            server.engines.script = lambda add: Script(token_ids=answer)
            chat = pb.ChatPrompt(messages=[pb.ChatMessage(role=pb.CHAT_ROLE_USER, content=CANARY)])
            await server.generate(pb.GenerateRequest(chat=chat, sampling=pb.SamplingParams(stop=[CANARY * 2])))

            def broken(*_: object) -> bytes:
                raise RuntimeError("a bug")

            server.app.generation._token_bytes = broken
            call = server.generation.Generate(
                text_request(CANARY, logprobs=1), metadata=(("x-request-id", "request-9"),)
            )
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async for _ in call:
                    pass
            assert error.value.code() is grpc.StatusCode.INTERNAL
            assert server.metric("loramux_generations_total", outcome="failed") == 1
            assert "request-9" in (error.value.details() or "") and "a bug" not in (error.value.details() or "")
            await server.assert_at_rest()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    text = stream.getvalue()
    assert CANARY not in text
    entries = [json.loads(line) for line in text.splitlines()]
    (failed,) = [entry for entry in entries if "stack" in entry]
    assert failed["correlation_id"] == "request-9" and len(failed["trace_id"]) == 32 and failed["generation_id"]


async def test_probes_follow_the_engine_and_the_drain(tmp_path: Path) -> None:
    engines = ScriptedEngines()
    engines.start_gate = asyncio.Event()
    async with front_end(tmp_path, engines, wait=False, probe="127.0.0.1:0") as server:
        assert (await http(server, "/livez"))[0] == 200 and (await http(server, "/readyz"))[0] == 503
        engines.start_gate.set()
        await server.app.ready.wait()
        assert (await http(server, "/readyz"))[0] == 200
        await server.app.drain()
        assert (await http(server, "/readyz"))[0] == 503 and (await http(server, "/livez"))[0] == 200
