"""How generations end other than by themselves: cancel, deadline, overload, clients that die or do not read."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from loramux.v1 import generation_pb2 as pb
from loramux_server.rpc import pipeline
from loramux_server.rpc.server import Transport
from loramux_server.rpc.slow_reader import SlowReader
from tests.support.front_end import detail, front_end, reason_of, status_of, text_request
from tests.support.generate_streams import failure, first_events, paused, rest, serving
from tests.support.scripted_engine import Script, ScriptedEngines


async def test_a_client_that_cancels_frees_everything(tmp_path: Path) -> None:
    async with front_end(tmp_path, ScriptedEngines(lambda add: paused())) as server:
        call = server.generation.Generate(text_request())
        await first_events(call, 3)
        call.cancel()
        await server.engines.until(lambda: len(server.engines.aborts) == 1)
        assert server.engines.aborts == [server.engines.adds[0].request_id]
        await server.assert_at_rest()
        assert server.metric("loramux_generations_total", outcome="cancelled") == 1
        assert server.metric("loramux_rpc_calls_total", rpc_response_status_code="CANCELLED") == 1


async def test_a_client_that_cancels_in_the_queue_frees_its_place(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with front_end(tmp_path, ScriptedEngines(lambda add: Script(hold=gate))) as server:
        call = server.generation.Generate(text_request())
        await server.engines.until(lambda: len(server.engines.adds) == 1)
        assert server.app.gate.queued == 1
        call.cancel()
        await server.engines.until(lambda: len(server.engines.aborts) == 1)
        await server.assert_at_rest()


async def test_the_deadline_ends_a_call_and_frees_everything(tmp_path: Path) -> None:
    async with front_end(tmp_path, ScriptedEngines(lambda add: paused())) as server:
        error = await failure(server.generation.Generate(text_request(), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await server.engines.until(lambda: len(server.engines.aborts) == 1)
        await server.assert_at_rest()


async def test_cancel_generation_ends_the_stream_well(tmp_path: Path) -> None:
    async with front_end(tmp_path, ScriptedEngines(lambda add: paused(4))) as server:
        call = server.generation.Generate(text_request(n=2))
        started = (await first_events(call, 1))[0].started
        received = 0
        while received < 8:
            received += len((await call.read()).delta.token_ids)
        answer = await server.generation.CancelGeneration(
            pb.CancelGenerationRequest(generation_id=started.generation_id)
        )
        assert answer.cancelled and answer.replica_id == "replica-1"
        events = await rest(call)
        reasons = [event.finished.reason for event in events if event.HasField("finished")]
        assert reasons == [pb.FINISH_REASON_CANCELLED] * 2
        assert events[-1].usage.output_tokens == 8
        assert await call.code() is grpc.StatusCode.OK
        again = await server.generation.CancelGeneration(
            pb.CancelGenerationRequest(generation_id=started.generation_id)
        )
        assert not again.cancelled
        await server.assert_at_rest()


async def test_headers_wait_for_started(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with front_end(tmp_path, ScriptedEngines(lambda add: Script(hold=gate))) as server:
        call = server.generation.Generate(text_request())
        headers = asyncio.create_task(call.initial_metadata())
        await server.engines.until(lambda: len(server.engines.adds) == 1)
        await asyncio.sleep(0.05)
        assert not headers.done()
        gate.set()
        await headers
        assert (await call.read()).HasField("started")
        call.cancel()


async def test_a_full_queue_refuses_at_once_and_health_answers(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with front_end(tmp_path, ScriptedEngines(lambda add: Script(hold=gate)), max_queued=8) as server:
        calls = [asyncio.create_task(server.generate(text_request())) for _ in range(32)]
        await server.engines.until(lambda: sum(call.done() for call in calls) == 24)
        assert await serving(server)
        gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert len(refused) == 24 and len(server.engines.adds) == 8
        for error in refused:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and reason_of(error) == "QUEUE_FULL"
            assert detail(status_of(error), error_details_pb2.RetryInfo).retry_delay.seconds == 1
            assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        await server.assert_at_rest()


async def test_a_reader_that_does_not_read_is_given_up_alone(tmp_path: Path) -> None:
    ids = list(range(100, 164)) * 7
    script = Script(token_ids=ids, per_frame=64, top=20)
    async with front_end(tmp_path, ScriptedEngines(lambda add: script)) as server:
        server.app.pipeline._slow_reader = SlowReader(pending_bytes=64 * 1024, seconds=0.4)
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{server.app.port}",
            options=(("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)),
        ) as channel:
            stalled = channel.unary_stream("/loramux.v1.GenerationService/Generate")(
                text_request(n=16, logprobs=20).SerializeToString()
            )
            assert await stalled.read()
            await server.engines.until(lambda: server.metric("loramux_generations_total") == 1)
            other = await server.generate(text_request(n=1))
            assert other[-1].usage.output_tokens == len(ids)
            assert reason_of(await failure(stalled)) == "SLOW_READER"
        await server.assert_at_rest()


CLIENT_PATH = str(Path(__file__).resolve().parents[2] / "client")
CLIENT = """
import sys, grpc
from loramux.v1 import generation_pb2 as pb, generation_pb2_grpc
stub = generation_pb2_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
for event in stub.Generate(pb.GenerateRequest(text="hello")):
    print("event", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_client_process_that_dies_or_freezes_frees_everything(tmp_path: Path, number: signal.Signals) -> None:
    options = {"transport": Transport(keepalive=1, ping_timeout=1)}
    async with front_end(tmp_path, ScriptedEngines(lambda add: paused()), app_options=options) as server:
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            CLIENT,
            f"127.0.0.1:{server.app.port}",
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": CLIENT_PATH},
        )
        try:
            assert client.stdout is not None
            assert await client.stdout.readline() == b"event\n"
            client.send_signal(number)
            await server.engines.until(lambda: len(server.engines.aborts) == 1)
            await server.assert_at_rest()
        finally:
            with contextlib.suppress(ProcessLookupError):
                client.kill()
            await client.communicate()


async def test_a_connection_that_never_speaks_http2_is_dropped(tmp_path: Path) -> None:
    async with front_end(tmp_path, app_options={"transport": Transport(handshake_timeout=0.2)}) as server:
        for first in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.app.port)
            writer.write(first)
            async with asyncio.timeout(10):
                while await reader.read(1024):
                    pass
            writer.close()
        assert (await server.generate(text_request()))[-1].HasField("usage")


async def test_a_client_stream_that_falls_silent_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_IDLE_SECONDS", 0.1)

    async def silent() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with front_end(tmp_path) as server:
        write = server.channel.stream_unary("/loramux.v1.AdapterService/WriteAdapterUpload")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await write(silent(), timeout=20)
        assert reason_of(error.value) == "DEADLINE_EXCEEDED" and "no message came" in str(error.value.details())
        await server.assert_at_rest()
