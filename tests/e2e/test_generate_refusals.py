"""Every bad input is refused before the engine sees it, with code, reason and field, and without echoing texts."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2

from loramux.v1 import adapter_pb2, adapter_pb2_grpc
from loramux.v1 import generation_pb2 as pb
from tests.support.front_end import FrontEnd, detail, front_end, reason_of, status_of, text_request

CANARY = "CANARY-7d1f"


def chat(*messages: pb.ChatMessage, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=messages, **fields))


USER = pb.ChatMessage(role=pb.CHAT_ROLE_USER, content=CANARY)
INVALID = [
    ("prompt", pb.GenerateRequest()),
    ("text", pb.GenerateRequest(text="")),
    ("token_ids.ids", pb.GenerateRequest(token_ids=pb.TokenIds())),
    ("token_ids.ids[1]", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 512]))),
    ("token_ids.ids[0]", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4_294_967_295]))),
    ("add_special_tokens", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), add_special_tokens=True)),
    ("adapter", pb.GenerateRequest(text=CANARY, adapter="")),
    ("adapter", pb.GenerateRequest(text=CANARY, adapter="../../etc/passwd")),
    ("chat.messages", chat()),
    ("chat.messages", chat(*[USER] * 1025)),
    ("chat.messages[0].role", chat(pb.ChatMessage(content=CANARY))),
    ("chat.messages[0].content", chat(pb.ChatMessage(role=pb.CHAT_ROLE_USER))),
    ("chat", chat(USER, pb.ChatMessage(role=pb.CHAT_ROLE_SYSTEM, content=CANARY))),
    ("sampling.temperature", text_request(CANARY, temperature=math.nan)),
    ("sampling.temperature", text_request(CANARY, temperature=math.inf)),
    ("sampling.temperature", text_request(CANARY, temperature=-0.1)),
    ("sampling.temperature", text_request(CANARY, temperature=10.5)),
    ("sampling.top_p", text_request(CANARY, top_p=0)),
    ("sampling.top_p", text_request(CANARY, top_p=1.5)),
    ("sampling.top_p", text_request(CANARY, top_p=math.nan)),
    ("sampling.min_p", text_request(CANARY, min_p=-1)),
    ("sampling.repetition_penalty", text_request(CANARY, repetition_penalty=0)),
    ("sampling.presence_penalty", text_request(CANARY, presence_penalty=2.5)),
    ("sampling.frequency_penalty", text_request(CANARY, frequency_penalty=-math.inf)),
    ("sampling.max_tokens", text_request(CANARY, max_tokens=0)),
    ("sampling.max_tokens", text_request(CANARY, max_tokens=2**31)),
    ("sampling.max_tokens", text_request(CANARY, max_tokens=511)),
    ("sampling.min_tokens", text_request(CANARY, max_tokens=4, min_tokens=5)),
    ("sampling.n", text_request(CANARY, n=0)),
    ("sampling.n", text_request(CANARY, n=1_000_000)),
    ("sampling.logprobs", text_request(CANARY, logprobs=21)),
    ("sampling.prompt_logprobs", text_request(CANARY, prompt_logprobs=4_294_967_295)),
    ("sampling.stop", text_request(CANARY, stop=[CANARY] * 100_000)),
    ("sampling.stop[1]", text_request(CANARY, stop=["a", ""])),
    ("sampling.stop[0]", text_request(CANARY, stop=[CANARY * 100])),
    ("sampling.stop_token_ids", text_request(CANARY, stop_token_ids=[1] * 65)),
    ("sampling.stop_token_ids[0]", text_request(CANARY, stop_token_ids=[512])),
    ("sampling.bad_words", text_request(CANARY, bad_words=["x"] * 65)),
    ("sampling.logit_bias", text_request(CANARY, logit_bias=dict.fromkeys(range(100000), 1.0))),
    ("sampling.logit_bias[512]", text_request(CANARY, logit_bias={512: 1.0})),
    ("sampling.logit_bias[1]", text_request(CANARY, logit_bias={1: math.nan})),
    ("sampling.logit_bias[1]", text_request(CANARY, logit_bias={1: 100.5})),
    ("sampling.truncate_prompt_tokens", text_request(CANARY, truncate_prompt_tokens=0)),
    ("sampling.priority", text_request(CANARY, priority=101)),
    ("sampling.split_key", text_request(CANARY, split_key="")),
    ("sampling.split_key", text_request(CANARY, split_key="k" * 257)),
    ("sampling.soft_time_limit", text_request(CANARY, soft_time_limit={"seconds": 0})),
    ("sampling.soft_time_limit", text_request(CANARY, soft_time_limit={"seconds": -1})),
    ("sampling.soft_time_limit", text_request(CANARY, soft_time_limit={"seconds": 1, "nanos": -5})),
]
TOO_LONG = [
    ("prompt", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 2_000_000))),
    ("prompt", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 512))),
    ("text", pb.GenerateRequest(text=CANARY * 200_000)),
    ("chat", chat(pb.ChatMessage(role=pb.CHAT_ROLE_USER, content=CANARY * 200_000))),
    ("chat", chat(pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="a", name=CANARY * 200_000))),
]
NOT_SERVED = [
    ("sampling.response_format", text_request(CANARY, response_format=pb.ResponseFormat(regex=CANARY))),
    ("chat.tools", chat(USER, tools=[pb.Tool(name="f")])),
    ("chat.tool_choice", chat(USER, tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED))),
    ("chat.continue_final_message", chat(USER, continue_final_message=True)),
    ("chat.enable_thinking", chat(USER, enable_thinking=False)),
    ("chat.messages[0].role", chat(pb.ChatMessage(role=pb.CHAT_ROLE_TOOL, content=CANARY))),
    (
        "chat.messages[0].tool_calls",
        chat(pb.ChatMessage(role=pb.CHAT_ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="f")])),
    ),
    (
        "chat.messages[0].reasoning_text",
        chat(pb.ChatMessage(role=pb.CHAT_ROLE_ASSISTANT, content="a", reasoning_text="b")),
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    async with front_end(tmp_path_factory.mktemp("refusals")) as running:
        yield running


async def refused(server: FrontEnd, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    call = server.generation.Generate(request, timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            raise AssertionError("a refused request has no events")
    assert CANARY not in str(error.value) and CANARY.encode() not in status_of(error.value).SerializeToString()
    return error.value


def check(server: FrontEnd, error: grpc.aio.AioRpcError, field: str, code: grpc.StatusCode, reason: str) -> None:
    assert error.code() is code, error.details()
    assert reason_of(error) == reason
    violations = detail(status_of(error), error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == [field]
    assert server.engines.adds == [] and server.app.gate.queued == 0


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("field", "request_"), INVALID, ids=[f"{i}-{field}" for i, (field, _) in enumerate(INVALID)])
async def test_out_of_range(server: FrontEnd, field: str, request_: pb.GenerateRequest) -> None:
    error = await refused(server, request_)
    check(server, error, field, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("field", "request_"), TOO_LONG, ids=[field for field, _ in TOO_LONG])
async def test_too_long(server: FrontEnd, field: str, request_: pb.GenerateRequest) -> None:
    error = await refused(server, request_)
    check(server, error, field, grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
    assert "512" in (error.details() or "") or "bytes" in (error.details() or "")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("field", "request_"), NOT_SERVED, ids=[field for field, _ in NOT_SERVED])
async def test_not_served_yet(server: FrontEnd, field: str, request_: pb.GenerateRequest) -> None:
    error = await refused(server, request_)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED and reason_of(error) == "NOT_SERVED_YET"
    assert field in (error.details() or "")
    assert server.engines.adds == []


@pytest.mark.asyncio(loop_scope="module")
async def test_an_unknown_adapter(server: FrontEnd) -> None:
    for name in ("nobody", "tenants/other/adapters/bot"):
        error = await refused(server, pb.GenerateRequest(text=CANARY, adapter=name))
        assert error.code() is grpc.StatusCode.NOT_FOUND and reason_of(error) == "ADAPTER_NOT_FOUND"


@pytest.mark.asyncio(loop_scope="module")
async def test_bytes_that_are_no_message(server: FrontEnd) -> None:
    raw = server.channel.unary_stream("/loramux.v1.GenerationService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in raw(b"\xff\xff\xff"):
            pass
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and reason_of(error.value) == "INVALID_PARAMETER"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_message_over_the_limit(server: FrontEnd) -> None:
    raw = server.channel.unary_stream("/loramux.v1.GenerationService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in raw(bytes(4 * 1024 * 1024 + 1)):
            pass
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.asyncio(loop_scope="module")
async def test_metadata_over_the_limit(server: FrontEnd) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await server.generate(text_request(), metadata=(("x-large", "x" * 20_000),))
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.engines.adds == []


@pytest.mark.asyncio(loop_scope="module")
async def test_another_tenant_and_an_unknown_method(server: FrontEnd) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await server.generate(text_request(), metadata=(("x-loramux-tenant", "acme"),))
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED and reason_of(error.value) == "PERMISSION_DENIED"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await server.channel.unary_unary("/loramux.v1.GenerationService/Nothing")(b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.asyncio(loop_scope="module")
async def test_a_refused_client_stream_keeps_its_reason(server: FrontEnd) -> None:
    def messages() -> Iterator[bytes]:
        for offset in range(40):
            request = adapter_pb2.WriteAdapterUploadRequest(upload_id="none", offset=offset, data=bytes(100_000))
            yield request.SerializeToString()

    write = server.channel.stream_unary("/loramux.v1.AdapterService/WriteAdapterUpload")
    for metadata, stream, reason in (
        ((("x-loramux-tenant", "acme"),), messages(), "PERMISSION_DENIED"),
        ((), messages(), "UPLOAD_NOT_FOUND"),
        ((), iter([b"\xff\xff"] * 40), "INVALID_PARAMETER"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await write(stream, metadata=metadata)
        assert reason_of(error.value) == reason


@pytest.mark.asyncio(loop_scope="module")
async def test_metadata_that_says_twice_for_whom_is_refused(server: FrontEnd) -> None:
    for name in ("x-loramux-tenant", "authorization"):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await server.generate(text_request(), metadata=((name, "default"), (name, "default")))
        check(server, error.value, name, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER")


@pytest.mark.asyncio(loop_scope="module")
async def test_no_list_or_map_is_looked_at_before_its_size(server: FrontEnd) -> None:
    """Requests of many tiny parts: each RPC takes the bytes that it has a use for, and counts before it copies."""
    adapters = adapter_pb2_grpc.AdapterServiceStub(server.channel)
    labels = {str(number): "" for number in range(3000)}
    name, paths = "bot", ["labels"]
    for call, field in (
        (adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(name_prefix="x" * 70_000)), None),
        (adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name, etag="x" * 70_000)), None),
        (server.generation.CancelGeneration(pb.CancelGenerationRequest(generation_id="x" * 70_000)), None),
        (adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(labels=labels)), "labels"),
        (adapters.ListAdapterVersions(adapter_pb2.ListAdapterVersionsRequest(adapter=name, states=[2] * 17)), "states"),
        (
            adapters.StartAdapterUpload(
                adapter_pb2.StartAdapterUploadRequest(adapter=name, files=[adapter_pb2.AdapterFile()] * 100_000)
            ),
            "files",
        ),
        (
            adapters.UpdateAdapter(
                adapter_pb2.UpdateAdapterRequest(
                    adapter=adapter_pb2.Adapter(name=name, labels=labels), update_mask={"paths": paths}
                )
            ),
            "adapter.labels",
        ),
        (
            adapters.UpdateAdapter(
                adapter_pb2.UpdateAdapterRequest(
                    adapter=adapter_pb2.Adapter(name=name), update_mask={"paths": [*paths * 16, "revision"]}
                )
            ),
            "update_mask",
        ),
        (server.generation.Detokenize(pb.DetokenizeRequest(token_ids=[1] * 131_073)), "token_ids"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and reason_of(error.value) == "INVALID_PARAMETER"
        violations = detail(status_of(error.value), error_details_pb2.BadRequest)
        assert (violations and violations.field_violations[0].field) == field


@pytest.mark.asyncio(loop_scope="module")
async def test_bytes_that_are_no_message_are_refused_by_health_and_reflection_too(server: FrontEnd) -> None:
    health = "/grpc.health.v1.Health"
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    calls = (
        server.channel.unary_unary(f"{health}/Check")(b"\xff\xff"),
        server.channel.unary_stream(f"{health}/Watch")(b"\xff\xff").read(),
        server.channel.stream_stream(reflection)(iter([b"\xff\xff"])).read(),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "DecodeError" not in str(error.value.details())
    assert await server.channel.unary_unary(f"{health}/Check")(b"") == b"\x08\x01"
    assert b"GenerationService" in await server.channel.stream_stream(reflection)(iter([b"\x3a\x00"])).read()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_burst_is_not_thinned_out_by_the_transport(server: FrontEnd) -> None:
    unknown = pb.CancelGenerationRequest(generation_id="unknown")
    answers = await asyncio.gather(*(server.generation.CancelGeneration(unknown) for _ in range(2500)))
    assert not any(answer.cancelled for answer in answers)


@pytest.mark.asyncio(loop_scope="module")
async def test_no_tool_choice_is_one_that_a_chat_without_tools_has_anyway(server: FrontEnd) -> None:
    for choice in (pb.ToolChoice(), pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)):
        assert (await server.generate(chat(USER, tool_choice=choice)))[-1].HasField("usage")


@pytest.mark.asyncio(loop_scope="module")
async def test_the_small_rpcs_check_too(server: FrontEnd) -> None:
    stub = server.generation
    for call in (
        stub.Tokenize(pb.TokenizeRequest()),
        stub.Tokenize(pb.TokenizeRequest(chat=pb.ChatPrompt(messages=[USER]), add_special_tokens=True)),
        stub.Detokenize(pb.DetokenizeRequest(token_ids=[512])),
        stub.CancelGeneration(pb.CancelGenerationRequest()),
        stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="x" * 129)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not (await stub.CancelGeneration(pb.CancelGenerationRequest(generation_id="unknown"))).cancelled


@pytest.mark.asyncio(loop_scope="module")
async def test_the_correlation_id_is_taken_or_minted(server: FrontEnd) -> None:
    for given, kept in (("req-1", True), ("no spaces allowed", False), ("x" * 129, False)):
        call = server.generation.Tokenize(pb.TokenizeRequest(text="a"), metadata=(("x-request-id", given),))
        await call
        answered = dict(await call.trailing_metadata())["x-request-id"]
        assert (answered == given) is kept and 1 <= len(answered) <= 128


@pytest.mark.asyncio(loop_scope="module")
async def test_zz_good_requests_still_run(server: FrontEnd) -> None:
    events = await server.generate(text_request())
    assert events[-1].HasField("usage")
    await server.assert_at_rest()
