"""Client spans and trace context, with OpenTelemetry and without."""

from collections.abc import Iterator

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed: pip install 'loramux[server]'")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from loramux import AdapterNotFound, AsyncClient, Client, _tracing
from loramux.testing import FakeError, FakeServer, Reply


class Spans:
    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def only(self) -> ReadableSpan:
        [span] = self._exporter.get_finished_spans()
        return span


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Spans of a provider of this test alone: the global one may be set only once in a process."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    api = _tracing._api()
    assert api is not None
    before = api.tracer
    api.tracer = provider.get_tracer("test")
    yield Spans(exporter)
    api.tracer = before
    provider.shutdown()


def test_a_generation(server: FakeServer, client: Client, spans: Spans) -> None:
    version = server.add_adapter("bot")
    server.fail("Generate", FakeError("UNAVAILABLE", pushback_ms=1))
    client.with_adapter("bot").generate("a secret prompt").result()
    span = spans.only()
    assert (span.name, span.kind) == ("loramux.v1.GenerationService/Generate", SpanKind.CLIENT)
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "bot"
    assert attributes["loramux.adapter_version"] == version
    assert attributes["gen_ai.usage.input_tokens"] == 15
    assert attributes["gen_ai.usage.output_tokens"] == 15
    assert "secret" not in str(attributes)
    assert span.context is not None
    traces = {call.metadata["traceparent"].split("-")[1] for call in server.calls_of("Generate")}
    assert traces == {f"{span.context.trace_id:032x}"}


async def test_an_error_has_its_kind_but_not_its_text(server: FakeServer, spans: Spans) -> None:
    async with AsyncClient(server.address) as client:
        with pytest.raises(AdapterNotFound):
            await client.generate("Hi", adapter="nope").result()
    span = spans.only()
    assert dict(span.attributes or {})["error.type"] == "ADAPTER_NOT_FOUND"
    assert span.status.status_code is StatusCode.ERROR
    assert not span.status.description


def test_a_stream_that_is_left_ends_its_span(server: FakeServer, client: Client, spans: Spans) -> None:
    server.reply(Reply(["x"], hang=True))
    with client.generate("Hi") as stream:
        next(stream)
    assert spans.only().status.status_code is StatusCode.UNSET


def test_unary(client: Client, spans: Spans) -> None:
    client.model()
    assert spans.only().name == "loramux.v1.ModelService/GetModel"


def test_without_opentelemetry(server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tracing, "_api", lambda: None)
    client.generate("Hi").result()
    assert "traceparent" not in server.calls[0].metadata
