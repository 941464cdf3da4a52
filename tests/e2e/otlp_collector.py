"""An OTLP/gRPC collector that keeps every span and metric it gets."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, keep: Any) -> None:
        self._keep = keep

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._keep(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, keep: Any) -> None:
        self._keep = keep

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._keep(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def attributes_of(span: trace_pb2.Span) -> dict[str, Any]:
    """Attributes of a span by name."""
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in span.attributes}


class Collector:
    """Listens on a free port from the beginning to the end of its block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: list[Any] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(self._keep), self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(self._keep), self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    def _keep(self, request: Any) -> None:
        with self._lock:
            self._requests.append(request)

    def spans(self, trace_id: str) -> list[trace_pb2.Span]:
        """Spans of a trace that have arrived.

        Args:
            trace_id: 32 hexadecimal digits.
        """
        return [span for span in self._spans() if span.trace_id.hex() == trace_id]

    def attributes(self, generation_id: str) -> dict[str, Any]:
        """Attributes of the span of a generation; empty while it has not arrived."""
        for span in self._spans():
            found = attributes_of(span)
            if found.get("gen_ai.response.id") == generation_id:
                return found
        return {}

    def _spans(self) -> list[trace_pb2.Span]:
        with self._lock:
            requests = [request for request in self._requests if hasattr(request, "resource_spans")]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def contains(self, text: str) -> bool:
        """Whether a text is in anything that arrived."""
        with self._lock:
            return any(text.encode() in request.SerializeToString() for request in self._requests)
