"""Messages at random to every method of a running server: whatever they say, the answer is no internal error."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from loramux import AsyncClient
from loramux.v1 import adapter_pb2, generation_pb2, model_pb2
from tests.e2e.real_server import RealServer, settled

INTEGERS = (0, 1, 2, 7, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1)
FLOATS = (0.0, 0.5, 1.0, -1.0, 1e30, float("nan"), float("inf"))
TEXTS = (
    "",
    "x",
    "fuzzed",
    "tenants/default/adapters/fuzzed",
    "tenants/other/adapters/v1/versions/1",
    "../..",
    "\0",
    "é" * 300,
)
BYTES = (b"", b"{}", b"\xff\xfe", b"\0" * 1000)
CALM = {"max_tokens": 3, "n": 2}
"""Values that keep what is accepted short."""


def _value(field: FieldDescriptor, draw: random.Random, depth: int) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_MESSAGE:
        return _message(GetMessageClass(field.message_type)(), draw, depth + 1)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        return draw.choice(BYTES if field.type == FieldDescriptor.TYPE_BYTES else TEXTS)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return draw.choice(FLOATS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return draw.choice([*(value.number for value in field.enum_type.values), 99])
    bits = 31 if kind == FieldDescriptor.CPPTYPE_INT32 else 32 if kind == FieldDescriptor.CPPTYPE_UINT32 else 63
    return draw.choice([number for number in INTEGERS if number < 2**bits])


def _message(message: Message, draw: random.Random, depth: int = 0) -> Message:
    """Fill fields at random, fewer the deeper they are."""
    for field in message.DESCRIPTOR.fields:
        if depth > 4 or draw.random() > (0.5 if depth < 2 else 0.25):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            if value.message_type is None:
                getattr(message, field.name)[_value(key, draw, depth)] = _value(value, draw, depth)
        elif field.is_repeated:
            values = [_value(field, draw, depth) for _ in range(draw.randrange(1, 3))]
            getattr(message, field.name).extend(values)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(_value(field, draw, depth))
        else:
            setattr(message, field.name, CALM.get(field.name) or _value(field, draw, depth))
    return message


def _methods() -> Iterator[MethodDescriptor]:
    for file in (generation_pb2, adapter_pb2, model_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


async def _code(channel: grpc.aio.Channel, method: MethodDescriptor, data: bytes) -> grpc.StatusCode:
    """Status that a method answers to a message; OK as well when it goes on streaming."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        async with asyncio.timeout(20):
            if method.client_streaming:
                await channel.stream_unary(path)(iter([data, data]))
            elif method.server_streaming:
                call = channel.unary_stream(path)(data)
                if method.name == "WatchAdapters":
                    await call.read()
                    call.cancel()
                    return grpc.StatusCode.OK
                async for _ in call:
                    pass
            else:
                await channel.unary_unary(path)(data)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_no_message_makes_an_internal_error(server: RealServer, adapters: Mapping[str, Path]) -> None:
    draw = random.Random(20)
    codes: Counter[grpc.StatusCode] = Counter()
    async with AsyncClient(server.address) as client:
        await client.adapters.upload(adapters["v1"], name="fuzzed", promote=True)
    async with grpc.aio.insecure_channel(server.address) as channel:
        for method in _methods():
            request = GetMessageClass(method.input_type)
            messages = [_message(request(), draw).SerializeToString() for _ in range(40)]
            messages += [draw.randbytes(draw.randrange(1, 60)) for _ in range(10)]
            messages += [b"", messages[0][:-1]]
            for data in messages:
                code = await _code(channel, method, data)
                assert code not in (
                    grpc.StatusCode.UNKNOWN,
                    grpc.StatusCode.INTERNAL,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                ), (method.full_name, data)
                codes[code] += 1
    assert codes[grpc.StatusCode.OK] and codes[grpc.StatusCode.INVALID_ARGUMENT] and codes[grpc.StatusCode.NOT_FOUND]
    await settled(server)
    assert "Traceback" not in server.log_text()
    async with AsyncClient(server.address) as client:
        result = await client.generate("x", adapter="rslora", max_tokens=2, ignore_eos=True).result()
        assert result.usage.output_tokens == 2
    print(dict(codes))
