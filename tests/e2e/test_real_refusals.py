"""Bad input to a running server: a clear error each, and the server goes on."""

import json
import shutil
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from loramux import (
    AdapterIncompatible,
    AdapterNotFound,
    AsyncClient,
    ChatMessage,
    ChatPrompt,
    InvalidRequest,
    LoramuxError,
    NotServedYet,
    ResponseFormat,
    Tool,
)
from loramux.v1 import adapter_pb2, adapter_pb2_grpc
from loramux.v1 import generation_pb2 as pb
from tests.e2e.real_server import RealServer
from tests.support.front_end import detail, reason_of, status_of

GENERATE = "/loramux.v1.GenerationService/Generate"
MEBIBYTE = 1 << 20


@pytest.fixture
async def client(server: RealServer) -> AsyncIterator[AsyncClient]:
    """A client of a server that has to answer as ever after the test."""
    async with AsyncClient(server.address) as made:
        yield made
        result = await made.generate("Still there?", adapter="v1", max_tokens=3, ignore_eos=True).result()
        assert result.usage.output_tokens == 3
        assert "Traceback" not in server.log_text() and '"stack"' not in server.log_text()


@pytest.fixture
async def channel(server: RealServer, client: AsyncClient) -> AsyncIterator[grpc.aio.Channel]:
    """A bare channel: it sends what the SDK would refuse to send."""
    async with grpc.aio.insecure_channel(
        server.address, options=[("grpc.max_send_message_length", 64 * MEBIBYTE)]
    ) as made:
        yield made


async def _refused(channel: grpc.aio.Channel, request: pb.GenerateRequest | bytes) -> grpc.aio.AioRpcError:
    """The error that a generation ends with."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    call = channel.unary_stream(
        GENERATE, request_serializer=bytes, response_deserializer=pb.GenerateResponse.FromString
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call(data, timeout=20):
            pass
    return caught.value


def _text(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(**sampling))


REQUESTS: dict[str, tuple[pb.GenerateRequest, str, list[str]]] = {
    "no prompt": (pb.GenerateRequest(), "INVALID_PARAMETER", ["prompt"]),
    "empty text": (pb.GenerateRequest(text=""), "INVALID_PARAMETER", ["text"]),
    "empty token ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), "INVALID_PARAMETER", ["token_ids.ids"]),
    "empty chat": (pb.GenerateRequest(chat=pb.ChatPrompt()), "INVALID_PARAMETER", ["chat.messages"]),
    "empty adapter": (pb.GenerateRequest(text="x", adapter=""), "INVALID_PARAMETER", ["adapter"]),
    "prompt too long": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 2048)),
        "PROMPT_TOO_LONG",
        ["prompt", "2048", "truncate_prompt_tokens"],
    ),
    "text too long": (pb.GenerateRequest(text="x" * (2 * MEBIBYTE)), "PROMPT_TOO_LONG", ["text", "1048576"]),
    "token id out of range": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 512])),
        "INVALID_PARAMETER",
        ["token_ids.ids[1]", "512", "511"],
    ),
    "max_tokens 0": (_text(max_tokens=0), "INVALID_PARAMETER", ["sampling.max_tokens", "0"]),
    "max_tokens huge": (_text(max_tokens=2**32 - 1), "INVALID_PARAMETER", ["sampling.max_tokens", "2047"]),
    "max_tokens over the context": (
        _text(max_tokens=2047),
        "INVALID_PARAMETER",
        ["sampling.max_tokens", "2047", "2048"],
    ),
    "min_tokens over max_tokens": (_text(max_tokens=3, min_tokens=4), "INVALID_PARAMETER", ["sampling.min_tokens"]),
    "temperature NaN": (_text(temperature=float("nan")), "INVALID_PARAMETER", ["sampling.temperature", "nan"]),
    "temperature infinite": (_text(temperature=float("inf")), "INVALID_PARAMETER", ["sampling.temperature", "inf"]),
    "top_p 0": (_text(top_p=0), "INVALID_PARAMETER", ["sampling.top_p"]),
    "n over the limit": (_text(n=17), "INVALID_PARAMETER", ["sampling.n", "17", "16"]),
    "n 0": (_text(n=0), "INVALID_PARAMETER", ["sampling.n"]),
    "logprobs over the limit": (_text(logprobs=21), "INVALID_PARAMETER", ["sampling.logprobs", "20"]),
    "an empty stop string": (_text(stop=["ok", ""]), "INVALID_PARAMETER", ["sampling.stop[1]"]),
    "a million stop strings": (_text(stop=["x"] * 10**6), "INVALID_PARAMETER", ["sampling.stop", "1000000", "16"]),
    "bias of no token": (_text(logit_bias={512: 1.0}), "INVALID_PARAMETER", ["sampling.logit_bias[512]"]),
    "bias NaN": (_text(logit_bias={1: float("nan")}), "INVALID_PARAMETER", ["sampling.logit_bias[1]"]),
}


@pytest.mark.parametrize("case", REQUESTS)
async def test_bad_requests(channel: grpc.aio.Channel, case: str) -> None:
    request, reason, parts = REQUESTS[case]
    error = await _refused(channel, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(error) == reason
    message = error.details() or ""
    assert all(part in message for part in parts), message
    violations = detail(status_of(error), error_details_pb2.BadRequest)
    assert violations is not None
    assert [violation.field for violation in violations.field_violations] == [parts[0]]


async def test_a_message_over_the_limit(channel: grpc.aio.Channel) -> None:
    error = await _refused(channel, _text(stop=["four"] * 10**6))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "4194304" in (error.details() or "")


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x02\xff\xfe",  # field 1, text: two bytes that are no UTF-8
        b"\x0a\xff\xff\xff\xff\x0f",  # a length far beyond the end
        b"\xff" * 40,
    ],
)
async def test_bytes_that_are_no_request(channel: grpc.aio.Channel, data: bytes) -> None:
    error = await _refused(channel, data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(error) == "INVALID_PARAMETER"
    assert "GenerateRequest" in (error.details() or "")


async def test_adapters_that_do_not_exist(client: AsyncClient) -> None:
    texts = set()
    for name in ("nobody", "v1@0123456789abcdef", "tenants/other/adapters/v1", "tenants/default/adapters/nobody"):
        with pytest.raises(AdapterNotFound) as caught:
            await client.generate("x", adapter=name, max_tokens=1).result()
        assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
        texts.add(caught.value.message)
    assert not [text for text in texts if "other" in text and "not known" not in text], "a foreign name tells nothing"
    with pytest.raises(InvalidRequest) as invalid:
        await client.generate("x", adapter="../../etc/passwd", max_tokens=1).result()
    assert invalid.value.reason == "INVALID_PARAMETER" and "adapter" in invalid.value.message


# --- adapters -----------------------------------------------------------------------------------------------------


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lie_about_header(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def _poison(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][1, 2] = torch.nan
    save_file(tensors, path)


def _reshape(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    tensors[name] = tensors[name][:, :-2].contiguous()
    save_file(tensors, path)


def _pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(2000))


ADAPTERS: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "NaN": (_poison, "ADAPTER_NUMERICS", ["lora_"]),
    "wrong shape": (_reshape, "ADAPTER_INCOMPATIBLE", ["lora_A"]),
    "truncated": (_truncate, "ADAPTER_INCOMPATIBLE", ["adapter_model.safetensors"]),
    "header beyond the file": (_lie_about_header, "ADAPTER_INCOMPATIBLE", ["adapter_model.safetensors"]),
    "pickle under our name": (_pickle, "ADAPTER_INCOMPATIBLE", ["adapter_model.safetensors"]),
    "DoRA": (lambda path: _edit_config(path, use_dora=True), "ADAPTER_INCOMPATIBLE", ["use_dora"]),
    "bias": (lambda path: _edit_config(path, bias="all"), "ADAPTER_INCOMPATIBLE", ["bias"]),
    "modules_to_save": (
        lambda path: _edit_config(path, modules_to_save=["lm_head"]),
        "ADAPTER_INCOMPATIBLE",
        ["modules_to_save"],
    ),
    "another kind of adapter": (
        lambda path: _edit_config(path, peft_type="IA3"),
        "ADAPTER_INCOMPATIBLE",
        ["peft_type"],
    ),
    "rank in config over the limit": (lambda path: _edit_config(path, r=128), "ADAPTER_INCOMPATIBLE", ["128", "64"]),
    "config that is no JSON": (
        lambda path: (path / "adapter_config.json").write_text("{") and None,
        "ADAPTER_INCOMPATIBLE",
        ["adapter_config.json"],
    ),
}


async def _upload_refused(client: AsyncClient, directory: Path, name: str) -> LoramuxError:
    with pytest.raises(LoramuxError) as caught:
        await client.adapters.upload(directory, name=name, promote=True)
    with pytest.raises(AdapterNotFound):
        await client.generate("x", adapter=name, max_tokens=1).result()
    return caught.value


@pytest.mark.parametrize("case", ADAPTERS)
async def test_bad_adapters(client: AsyncClient, adapters: Mapping[str, Path], tmp_path: Path, case: str) -> None:
    spoil, reason, parts = ADAPTERS[case]
    directory = Path(shutil.copytree(adapters["v1"], tmp_path / "adapter"))
    spoil(directory)
    error = await _upload_refused(client, directory, "bad-" + case.lower().replace(" ", "-"))
    assert error.reason == reason, str(error)
    assert isinstance(error, AdapterIncompatible)
    assert all(part in error.message for part in parts), error.message
    assert str(tmp_path) not in error.message and "/tmp" not in error.message


async def test_an_adapter_of_peft_with_too_high_a_rank(client: AsyncClient, checkpoint: Path, tmp_path: Path) -> None:
    from tests.support.tiny_models import make_adapter

    directory = make_adapter(tmp_path / "wide", checkpoint, rank=128, target_modules=["q_proj"])
    error = await _upload_refused(client, directory, "wide")
    assert (type(error), error.reason) == (AdapterIncompatible, "ADAPTER_INCOMPATIBLE")
    assert "128" in error.message and "64" in error.message


async def test_an_adapter_of_another_base(client: AsyncClient, tmp_path: Path) -> None:
    from tests.support.tiny_models import make_adapter, make_checkpoint

    other = make_checkpoint(tmp_path / "other", "qwen2", hidden=128)
    error = await _upload_refused(client, make_adapter(tmp_path / "adapter", other, rank=4), "foreign")
    assert (type(error), error.reason) == (AdapterIncompatible, "ADAPTER_INCOMPATIBLE")


async def test_pickled_weights(
    client: AsyncClient, channel: grpc.aio.Channel, adapters: Mapping[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(adapters["v1"], tmp_path / "adapter"))
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(InvalidRequest, match="pickle"):  # the SDK does not send it
        await client.adapters.upload(directory, name="pickled")
    stub = adapter_pb2_grpc.AdapterServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.StartAdapterUpload(
            adapter_pb2.StartAdapterUploadRequest(
                adapter="pickled",
                adapter_config=(directory / "adapter_config.json").read_bytes(),
                files=[adapter_pb2.AdapterFile(name="adapter_model.bin", size=100, sha256="0" * 64)],
            ),
            timeout=20,
        )
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert reason_of(caught.value) in ("ADAPTER_INCOMPATIBLE", "INVALID_PARAMETER")
    assert "safetensors" in (caught.value.details() or "")


# --- what is not served yet ---------------------------------------------------------------------------------------


async def test_options_that_are_not_served_yet_say_so(client: AsyncClient) -> None:
    ask = [ChatMessage("user", "Hi")]
    generations = {
        "sampling.response_format": client.generate("x", response_format=ResponseFormat(regex="a+")),
        "chat.tools": client.generate(ChatPrompt(ask, tools=[Tool(name="look")])),
        "chat.continue_final_message": client.generate(
            ChatPrompt([*ask, ChatMessage("assistant", "A")], continue_final_message=True)
        ),
        "chat.enable_thinking": client.generate(ChatPrompt(ask, enable_thinking=True)),
    }
    for field, stream in generations.items():
        with pytest.raises(NotServedYet, match=field) as caught:
            await stream.result()
        assert (caught.value.code, caught.value.reason) == ("UNIMPLEMENTED", "NOT_SERVED_YET")
        assert [violation.field for violation in caught.value.field_violations] in ([], [field])
    calls = {
        "pin": lambda: client.adapters.pin("v1"),
        "CreateGrant": lambda: client.adapters.grant("v1", "other"),
        "ListGrants": lambda: anext(client.adapters.grants("v1")),
        "DeleteGrant": lambda: client.adapters.revoke("tenants/default/adapters/v1/grants/other"),
        "GetTenantUsage": lambda: anext(client.adapters.usage()),
    }
    for name, call in calls.items():
        with pytest.raises(NotServedYet, match=name) as refused:
            await call()
        assert refused.value.reason == "NOT_SERVED_YET"


async def test_an_unknown_method_of_a_known_service(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary("/loramux.v1.GenerationService/Guess")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
