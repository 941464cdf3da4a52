"""The life of a server: its start, health, the death of its engine, drain."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from loramux.v1 import adapter_pb2, adapter_pb2_grpc, model_pb2, model_pb2_grpc
from loramux.v1 import generation_pb2 as pb
from loramux_server.app import App
from loramux_server.engine.messages import PutAlias, Started
from loramux_server.run import serve
from loramux_server.startup import ServeError
from loramux_server.supervisor import CrashLoop, RestartPolicy
from tests.support.front_end import FrontEnd, NoUploads, front_end, make_config, reason_of, text_request
from tests.support.generate_streams import failure, first_events, paused, rest, serving
from tests.support.scripted_engine import Script, ScriptedEngines

FAST = RestartPolicy(first_delay=0.01, longest_delay=0.02, crashes=3, window=60.0)


async def probed(server: FrontEnd, path: str) -> int:
    """Status of an HTTP answer of the probe listener."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.app.probe_port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()


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
