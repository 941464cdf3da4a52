"""Telemetry of one RPC: a server span under the caller's trace context, the rpc metrics, the call counter."""

import time
from collections.abc import Callable, Mapping

from opentelemetry import context as otel_context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from loramux_server.telemetry.metrics import Metrics

_PROPAGATOR = TraceContextTextMapPropagator()
_OURS = frozenset({"INTERNAL", "UNAVAILABLE", "UNKNOWN", "DATA_LOSS", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"})


class RpcSpan:
    """One call, from arrival to its status."""

    def __init__(
        self,
        metrics: Metrics,
        tracer: Tracer,
        method: str,
        metadata: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin the span and make it the current one of this task.

        Args:
            metrics: Instruments.
            tracer: For the span.
            method: Full name with a leading slash.
            metadata: Text metadata; `traceparent` and `tracestate` give the parent.
            clock: Monotonic seconds.
        """
        self._metrics = metrics
        self._clock = clock
        self._start = clock()
        self._method = method.lstrip("/")
        parent = _PROPAGATOR.extract(metadata)
        self._span = tracer.start_span(
            self._method,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": self._method},
        )
        metrics.running_rpcs.add(1)
        otel_context.attach(set_span_in_context(self._span, parent))

    def ended(self, *, code: str, reason: str) -> None:
        """Record the outcome.

        Args:
            code: Status code name.
            reason: `Reason` value or "".
        """
        attributes = {"rpc.system.name": "grpc", "rpc.method": self._method, "rpc.response.status_code": code}
        self._metrics.running_rpcs.add(-1)
        self._metrics.rpc_duration.record(self._clock() - self._start, attributes)
        self._metrics.rpc_calls.add(1, {**attributes, "loramux.reason": reason})
        self._span.set_attribute("rpc.response.status_code", code)
        if reason:
            self._span.set_attribute("error.type", reason)
        if code in _OURS:
            self._span.set_status(Status(StatusCode.ERROR, reason or code))
        self._span.end()
