"""Readiness and the first scan of `--adapters`, on a scripted engine and a validator that waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.v1 import model_pb2, model_pb2_grpc
from loramux_server.app import App
from tests.support.front_end import make_config
from tests.support.lifecycle_doubles import CONFIG, FakeValidator
from tests.support.scripted_engine import ScriptedEngines


@contextlib.asynccontextmanager
async def _held_up(root: Path) -> AsyncIterator[tuple[App, FakeValidator, ScriptedEngines, grpc.aio.Channel]]:
    """A server that is in the middle of its first scan."""
    adapter = root / "adapters" / "default" / "bot"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_bytes(CONFIG)
    (adapter / "adapter_model.safetensors").write_text("v1")
    validator, engines = FakeValidator(gate=asyncio.Event()), ScriptedEngines()
    config = make_config(root, adapters=str(root / "adapters"), probe="127.0.0.1:0", allow_unverified_adapters=True)
    app = App(config, version="test", launch=engines, validator=validator)
    await app.start()
    try:
        await engines.until(lambda: validator.calls > 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            yield app, validator, engines, channel
    finally:
        await app.stop()


async def _probe(app: App) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", app.probe_port)
    writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.split(b" ")[1]


async def _told(app: App, channel: grpc.aio.Channel) -> tuple[bytes, int, int, bool]:
    """What probe, health, status and the process's own line say."""
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    status = await model_pb2_grpc.ModelServiceStub(channel).GetServerStatus(model_pb2.GetServerStatusRequest())
    return await _probe(app), health.status, status.status.state, app.ready.is_set()


NOT_YET = (b"503", health_pb2.HealthCheckResponse.NOT_SERVING, model_pb2.SERVER_STATE_STARTING, False)
READY = (b"200", health_pb2.HealthCheckResponse.SERVING, model_pb2.SERVER_STATE_SERVING, True)


async def test_a_server_is_ready_when_its_directory_is_served(tmp_path: Path) -> None:
    async with _held_up(tmp_path) as (app, validator, engines, channel):
        assert await _told(app, channel) == NOT_YET
        assert validator.gate is not None
        validator.gate.set()
        async with asyncio.timeout(20):
            await app.ready.wait()
        assert await _told(app, channel) == READY
        assert app.lifecycle.table.resolve("default", "bot").alias == "tenants/default/adapters/bot"

        # A later engine does not wait for a scan.
        engines.engines[-1].crash()
        await engines.until(lambda: not app.ready.is_set())
        async with asyncio.timeout(20):
            await app.ready.wait()
        assert await _told(app, channel) == READY


async def test_an_engine_that_dies_in_the_first_scan_leaves_the_server_unready(tmp_path: Path) -> None:
    async with _held_up(tmp_path) as (app, validator, engines, channel):
        engines.engines[-1].crash()
        await engines.until(lambda: not app.engine.serving)
        await engines.until(lambda: app.engine.serving)
        assert await _told(app, channel) == NOT_YET
        assert validator.gate is not None
        validator.gate.set()
        async with asyncio.timeout(20):
            await app.ready.wait()
        assert await _told(app, channel) == READY


async def test_a_drain_ends_the_scan_and_announces_nothing(tmp_path: Path) -> None:
    async with _held_up(tmp_path) as (app, _, _, channel):
        async with asyncio.timeout(20):
            await app.drain()
        assert app._source is not None and app._source._following is not None
        assert app._source._following.cancelled() and not app.ready.is_set()
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == NOT_YET[1]
