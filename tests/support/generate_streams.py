"""Raw streams of Generate against a scripted engine: what one reads of them, and how they end."""

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loramux.v1 import generation_pb2 as pb
from tests.support.front_end import FrontEnd
from tests.support.scripted_engine import Script

ENDLESS = [70, 71] * 200


def paused(after: int = 2) -> Script:
    """A generation that waits for `resume` after so many tokens."""
    return Script(token_ids=ENDLESS, pause_after=after)


async def first_events(call: grpc.aio.UnaryStreamCall, count: int) -> list[pb.GenerateResponse]:
    """The next events."""
    return [await call.read() for _ in range(count)]


async def rest(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerateResponse]:
    """All events up to the end."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def failure(call: grpc.aio.UnaryStreamCall) -> grpc.aio.AioRpcError:
    """The error that ends the stream."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await rest(call)
    return error.value


async def serving(server: FrontEnd, service: str = "") -> bool:
    """Whether health calls a service serving; the empty name is the whole server."""
    response = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest(service=service))
    return response.status == health_pb2.HealthCheckResponse.SERVING
