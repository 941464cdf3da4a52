"""Random requests and random bytes: every answer is an event stream or a refusal with a reason, never our fault."""

import random
from pathlib import Path

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from loramux.v1 import generation_pb2 as pb
from tests.support.front_end import front_end, reason_of
from tests.support.scripted_engine import ScriptedEngines

EXPECTED = {"INVALID_PARAMETER", "PROMPT_TOO_LONG", "NOT_SERVED_YET", "ADAPTER_NOT_FOUND"}
INTEGERS = [0, 1, 2, 20, 21, 511, 512, 2**31, 2**32 - 1]
FLOATS = [0.0, 0.5, 1.0, -1.0, 2.0, 1e30, float("nan"), float("inf"), -0.0]
TEXTS = ["", "a", "hello fox", "😀", "\x00", "../..", "x" * 300, "tenants/a/adapters/b@c"]


def scalar(field: FieldDescriptor, rng: random.Random) -> object:
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice(FLOATS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return rng.choice(TEXTS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type == FieldDescriptor.CPPTYPE_INT32:
        return rng.choice([-(2**31), -1, 0, 1, 100, 101, 2**31 - 1])
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice([0, 1, 2, 3, 4, 99])
    return rng.choice(INTEGERS)


def fill(message: Message, rng: random.Random, density: float) -> None:
    for field in message.DESCRIPTOR.fields:
        if rng.random() > density:
            continue
        target = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(rng.randint(1, 3)):
                target[rng.choice(INTEGERS)] = rng.choice(FLOATS)
        elif field.is_repeated:
            for _ in range(rng.randint(1, 3)):
                if field.message_type is not None:
                    fill(target.add(), rng, density)
                else:
                    target.append(scalar(field, rng))
        elif field.message_type is not None:
            target.SetInParent()
            fill(target, rng, density)
        else:
            setattr(message, field.name, scalar(field, rng))


async def test_random_requests(tmp_path: Path) -> None:
    rng = random.Random(7)
    async with front_end(tmp_path, ScriptedEngines()) as server:
        outcomes: dict[str, int] = {}
        for number in range(600):
            request = pb.GenerateRequest()
            fill(request, rng, density=(0.05, 0.15, 0.5)[number % 3])
            try:
                events = await server.generate(request)
                assert events[0].HasField("started") and events[-1].HasField("usage"), request
                outcome = "served"
            except grpc.aio.AioRpcError as error:
                outcome = reason_of(error)
                assert outcome in EXPECTED, (request, error)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert outcomes.keys() >= {"served", *EXPECTED - {"PROMPT_TOO_LONG"}}, outcomes
        await server.assert_at_rest()


async def test_random_bytes(tmp_path: Path) -> None:
    rng = random.Random(8)
    async with front_end(tmp_path) as server:
        for name in ("Generate", "BatchGenerate"):
            raw = server.channel.unary_stream(f"/loramux.v1.GenerationService/{name}")
            for _ in range(150):
                call = raw(rng.randbytes(rng.randint(1, 60)))
                try:
                    async for _ in call:
                        pass
                except grpc.aio.AioRpcError as error:
                    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED), error
        await server.assert_at_rest()
