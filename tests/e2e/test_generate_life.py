"""How generations end other than by themselves: cancel, deadline, overload, engine death, slow readers, drain."""

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
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.v1 import adapter_pb2, adapter_pb2_grpc, model_pb2, model_pb2_grpc
from loramux.v1 import generation_pb2 as pb
from loramux_server.app import App, ServeError
from loramux_server.engine.messages import PutAlias, Started
from loramux_server.rpc import pipeline
from loramux_server.rpc.server import Transport
from loramux_server.rpc.slow_reader import SlowReader
from loramux_server.run import serve
from loramux_server.supervisor import CrashLoop, RestartPolicy
from tests.support.front_end import (
    FrontEnd,
    NoUploads,
    detail,
    front_end,
    make_config,
    reason_of,
    status_of,
    text_request,
)
from tests.support.scripted_engine import Script, ScriptedEngines

ENDLESS = [70, 71] * 200
FAST = RestartPolicy(first_delay=0.01, longest_delay=0.02, crashes=3, window=60.0)


def paused(after: int = 2) -> Script:
    return Script(token_ids=ENDLESS, pause_after=after)


async def probed(server: FrontEnd, path: str) -> int:
    """Status of an HTTP answer of the probe listener."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.app.probe_port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()


async def first_events(call: grpc.aio.UnaryStreamCall, count: int) -> list[pb.GenerateResponse]:
    return [await call.read() for _ in range(count)]


async def rest(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerateResponse]:
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def failure(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rest(call)
    return error.value


async def serving(server: FrontEnd, service: str = "") -> bool:
    response = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(service=service))
    return response.status == health_pb2.HealthCheckResponse.SERVING


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


async def test_commands_of_one_tick_leave_in_one_frame(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        frames = server.engines.frames
        await server.generation.Tokenize(pb.TokenizeRequest(text="a"))
        for number in range(20):
            server.app.engine.abort(str(number))
        await server.engines.until(lambda: len(server.engines.aborts) == 20)
        assert server.engines.frames == frames + 1


async def test_engine_death_fails_all_and_a_new_engine_serves(tmp_path: Path) -> None:
    async with front_end(tmp_path, ScriptedEngines(lambda add: paused()), app_options={"policy": FAST}) as server:
        calls = [server.generation.Generate(text_request()) for _ in range(10)]
        for call in calls:
            await first_events(call, 2)
        server.engines.start_gate = asyncio.Event()
        server.engines.current.crash()
        async with asyncio.timeout(1.0):
            errors = [await failure(call) for call in calls]
        assert {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}
        assert {reason_of(error) for error in errors} == {"ENGINE_UNAVAILABLE"}
        assert not await serving(server)
        error = await failure(server.generation.Generate(text_request()))
        assert reason_of(error) == "ENGINE_UNAVAILABLE"
        status = (
            await model_pb2_grpc.ModelServiceStub(server.channel).GetServerStatus(model_pb2.GetServerStatusRequest())
        ).status
        assert status.state == model_pb2.SERVER_STATE_ENGINE_RESTARTING
        server.engines.start_gate.set()
        await server.app.ready.wait()
        assert await serving(server, "loramux.v1.GenerationService")
        server.engines.script = lambda add: Script()
        assert (await server.generate(text_request()))[-1].HasField("usage")
        assert len(server.engines.engines) == 2
        await server.assert_at_rest()


async def test_frames_of_another_epoch_are_dropped(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with front_end(tmp_path, ScriptedEngines(lambda add: Script(hold=gate))) as server:
        call = asyncio.create_task(server.generate(text_request()))
        await server.engines.until(lambda: len(server.engines.adds) == 1)
        stale = Started(
            request_id=server.engines.adds[0].request_id,
            version="",
            digest="",
            revision=0,
            cached_tokens=99,
            queue_time=0,
            load_time=0,
        )
        await server.engines.current.send(stale, epoch=99)
        gate.set()
        assert (await call)[0].started.cached_tokens == 0


async def test_an_engine_that_keeps_dying_is_given_up(tmp_path: Path) -> None:
    async with front_end(tmp_path, app_options={"policy": FAST}, probe="127.0.0.1:0") as server:
        ended = asyncio.create_task(server.app.wait())
        assert await probed(server, "/livez") == 200
        for number in range(1, 4):
            await server.engines.until(lambda: len(server.engines.engines) == number)  # noqa: B023 - awaited here
            await server.engines.until(lambda: server.app.engine.serving)
            server.engines.current.crash()
        with pytest.raises(CrashLoop, match="died 3 times"):
            await ended
        assert await probed(server, "/livez") == 503, "only a restart of the process helps"


async def test_a_startup_error_is_one_message(tmp_path: Path) -> None:
    engines = ScriptedEngines()
    engines.startup_error = "model type mamba is not served; use one of llama, qwen2"
    with pytest.raises(ServeError, match="model type mamba"):
        async with serve(make_config(tmp_path), version="test", launch=engines, validator=NoUploads()):
            raise AssertionError("it never serves")


async def test_health_follows_the_engine_by_service_name(tmp_path: Path) -> None:
    engines = ScriptedEngines()
    engines.start_gate = asyncio.Event()
    async with front_end(tmp_path, engines, wait=False) as server:
        names = ["", *(f"loramux.v1.{name}Service" for name in ("Generation", "Adapter", "Model"))]
        for name in names:
            assert not await serving(server, name)
        engines.start_gate.set()
        await server.app.ready.wait()
        for name in names:
            await server.engines.until(server.app.ready.is_set)
            assert await serving(server, name)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await serving(server, "loramux.v1.Nothing")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_model_is_described(tmp_path: Path) -> None:
    async with front_end(tmp_path, model_name="tiny", max_output_tokens=100) as server:
        model = (await model_pb2_grpc.ModelServiceStub(server.channel).GetModel(model_pb2.GetModelRequest())).model
        assert (model.name, model.family, model.vocab_size, model.max_model_len) == ("tiny", "llama", 512, 512)
        assert (model.fingerprint.config_digest, model.fingerprint.weights_digest) == ("c" * 64, "d" * 64)
        assert model.fingerprint.digest == "f" * 64 and model.has_chat_template
        assert model.limits.max_output_tokens == 100 and model.limits.max_message_bytes == 4 * 1024 * 1024
        status = (
            await model_pb2_grpc.ModelServiceStub(server.channel).GetServerStatus(model_pb2.GetServerStatusRequest())
        ).status
        assert status.state == model_pb2.SERVER_STATE_SERVING and status.own.tenant == "default"
        assert status.total.resident_weight_bytes == 1234


async def test_drain_lets_calls_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    script = paused()
    async with front_end(tmp_path, ScriptedEngines(lambda add: script)) as server:
        calls = [server.generation.Generate(text_request(max_tokens=6)) for _ in range(10)]
        for call in calls:
            await first_events(call, 2)
        drained = asyncio.create_task(server.app.drain())
        await server.engines.until(lambda: server.app.draining)
        assert not await serving(server)
        error = await failure(server.generation.Generate(text_request()))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and reason_of(error) == "DRAINING"
        assert not drained.done()
        script.resume.set()
        for call in calls:
            assert (await rest(call))[-1].HasField("usage")
        async with asyncio.timeout(2):
            await drained


async def test_a_drain_ends_watches_and_does_not_wait_for_them(tmp_path: Path) -> None:
    async with front_end(tmp_path, grace=60.0) as server:
        watch = adapter_pb2_grpc.AdapterServiceStub(server.channel).WatchAdapters(adapter_pb2.WatchAdaptersRequest())
        assert (await watch.read()).WhichOneof("event")
        async with asyncio.timeout(5):
            await server.app.drain()
        error = await failure(watch)
        assert error.code() is grpc.StatusCode.UNAVAILABLE and reason_of(error) == "DRAINING"


async def test_drain_gives_up_after_the_grace(tmp_path: Path) -> None:
    async with front_end(tmp_path, ScriptedEngines(lambda add: paused()), grace=0.05) as server:
        call = server.generation.Generate(text_request())
        await first_events(call, 2)
        async with asyncio.timeout(2):
            await server.app.drain()
            await server.app.stop()
        assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE


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


async def test_a_port_in_use_and_a_locked_store_are_one_line(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        config = make_config(tmp_path, port=server.app.port, store=str(tmp_path / "other"))
        with pytest.raises(ServeError, match=f"--port {server.app.port}"):
            await App(config, version="test", launch=ScriptedEngines(), validator=NoUploads()).start()
        config = make_config(tmp_path)
        with pytest.raises(ServeError, match="--store"):
            await App(config, version="test", launch=ScriptedEngines(), validator=NoUploads()).start()


async def test_no_alias_is_sent_when_there_are_none(tmp_path: Path) -> None:
    async with front_end(tmp_path) as server:
        assert not [command for command in server.engines.commands if isinstance(command, PutAlias)]


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
