"""A whole front end on a scripted engine, and raw stubs to call it with."""

import contextlib
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from loramux.v1 import generation_pb2 as pb
from loramux.v1 import generation_pb2_grpc
from loramux_server.app import App
from loramux_server.config import ServerConfig, load_config
from tests.support.scripted_engine import ScriptedEngines
from tests.support.tiny_tokenizers import byte_level, write_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must be first') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class NoUploads:
    """These tests upload nothing."""

    async def validate(self, directory: Path) -> Any:
        raise AssertionError("nothing is uploaded here")


def write_base(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write a checkpoint whose single tensor no engine reads."""
    tokenizer = byte_level()
    config = {"eos_token": "<|im_end|>", "bos_token": "<|begin|>"}
    if template is not None:
        config["chat_template"] = template
    write_tokenizer(
        directory,
        tokenizer,
        tokenizer_config=config,
        config={"model_type": "llama", "vocab_size": 512, "eos_token_id": tokenizer.token_to_id("<|im_end|>")},
    )
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return directory


def make_config(root: Path, **settings: Any) -> ServerConfig:
    """Settings of a test server on port 0."""
    base = root / "base"
    if not base.exists():
        write_base(base)
    values = {"model": str(base), "store": str(root / "store"), "port": 0, "replica_id": "replica-1", "grace": 5.0}
    return load_config({**values, **settings}, environment={})


class FrontEnd:
    """A running server with its engine script and stubs."""

    def __init__(self, app: App, engines: ScriptedEngines, channel: grpc.aio.Channel) -> None:
        self.app = app
        self.engines = engines
        self.channel = channel
        self.generation = generation_pb2_grpc.GenerationServiceStub(channel)

    async def generate(self, request: pb.GenerateRequest, **call: Any) -> list[pb.GenerateResponse]:
        """All events of a generation."""
        return [event async for event in self.generation.Generate(request, timeout=call.pop("timeout", 20), **call)]

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.app.generation._prompts.tokenizer.encode(text, add_special_tokens=False)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a Prometheus series over all label sets that contain `labels`."""
        total = 0.0
        for line in self.app.telemetry.prometheus().splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(f'{key}="{text}"' in series for key, text in labels.items()):
                total += float(value)
        return total

    async def assert_at_rest(self) -> None:
        """Nothing is left of any request, on either side of the socket."""
        await self.engines.assert_at_rest()
        await self.engines.until(lambda: self.app.pipeline.running == 0)
        assert self.app.gate.queued == 0
        assert self.app.engine.open_requests == 0
        assert self.app.engine.waiting == 0
        self.app.generation.check_integrity()


@contextlib.asynccontextmanager
async def front_end(
    root: Path, engines: ScriptedEngines | None = None, *, wait: bool = True, app_options: Any = None, **settings: Any
) -> AsyncIterator[FrontEnd]:
    """Run a server on a scripted engine."""
    engines = engines or ScriptedEngines()
    app = App(
        make_config(root, **settings), version="test", launch=engines, validator=NoUploads(), **(app_options or {})
    )
    await app.start()
    try:
        if wait:
            await app.ready.wait()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            yield FrontEnd(app, engines, channel)
    finally:
        await app.stop()


def text_request(text: str = "hello", **sampling: Any) -> pb.GenerateRequest:
    """A request with a text prompt."""
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**sampling))


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status in the trailers."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return status


def detail(status: status_pb2.Status, kind: type[Any]) -> Any:
    """The detail of one kind; None if there is none."""
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """ErrorInfo.reason of a failed call."""
    info = detail(status_of(error), error_details_pb2.ErrorInfo)
    assert info is not None and info.domain == "loramux"
    return str(info.reason)
