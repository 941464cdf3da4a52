"""Builds the server's own meter and tracer providers; nothing global is set, so servers may share a process."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opentelemetry.sdk.environment_variables import OTEL_TRACES_SAMPLER
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Tracer

from loramux_server.telemetry.gateway import render_gateway
from loramux_server.telemetry.metrics import CertificateStats, EngineTotals, Metrics
from loramux_server.telemetry.prometheus import render
from loramux_server.telemetry.rpc_span import RpcSpan

_SCOPE = "loramux"
# Of one export, its retries included: a collector that is away must not hold up the end of the server.
_EXPORT_TIMEOUT_S = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What the rest of the server records with.

    Attributes:
        metrics: Instruments.
        tracer: Of the server's provider.
        engine: Newest engine statistics.
    """

    metrics: Metrics
    tracer: Tracer
    engine: EngineTotals
    _queued: Callable[[], int]
    _reader: InMemoryMetricReader
    _meters: MeterProvider
    _tracers: TracerProvider

    def prometheus(self) -> str:
        """Render `/metrics`."""
        return render(self._reader.get_metrics_data()) + render_gateway(self.engine.stats, self._queued())

    def observe_rpc(self, method: str, metadata: Mapping[str, str]) -> RpcSpan:
        """Begin the telemetry of a call."""
        return RpcSpan(self.metrics, self.tracer, method, metadata)

    def close(self) -> None:
        """Flush exporters and stop their threads."""
        self._tracers.shutdown()
        self._meters.shutdown()


def build_telemetry(
    *,
    queued: Callable[[], int],
    replica_id: str,
    version: str,
    certificate: Callable[[], CertificateStats | None] = lambda: None,
    otlp_endpoint: str | None = None,
    span_processor: SpanProcessor | None = None,
) -> Telemetry:
    """Create providers and instruments.

    Args:
        queued: Reads how many requests the front end holds before their start.
        replica_id: Resource attribute `service.instance.id`.
        version: Resource attribute `service.version`.
        certificate: Reads the state of the listener's certificate; None = plaintext.
        otlp_endpoint: OTLP/gRPC collector, `http://host:4317` for plaintext or `https://...`; None exports nothing.
        span_processor: An extra receiver of spans (tests).
    """
    resource = Resource.create(
        {"service.name": "loramux", "service.instance.id": replica_id, "service.version": version}
    )
    reader = InMemoryMetricReader()
    readers: list[MetricReader] = [reader]
    # Callers' trace context gives the parent, never the decision: whether to sample is the operator's.
    sampler = None if OTEL_TRACES_SAMPLER in os.environ else ALWAYS_ON
    tracers = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
    if span_processor is not None:
        tracers.add_span_processor(span_processor)
    if otlp_endpoint is not None:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        tracers.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint, timeout=_EXPORT_TIMEOUT_S))
        )
        readers.append(
            PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=otlp_endpoint, timeout=_EXPORT_TIMEOUT_S))
        )
    meters = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)
    engine = EngineTotals()
    return Telemetry(
        metrics=Metrics(meters.get_meter(_SCOPE, version), engine=engine, queued=queued, certificate=certificate),
        tracer=tracers.get_tracer(_SCOPE, version),
        engine=engine,
        _queued=queued,
        _reader=reader,
        _meters=meters,
        _tracers=tracers,
    )
