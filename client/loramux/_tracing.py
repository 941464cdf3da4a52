"""Client spans and trace context, if the OpenTelemetry API package is installed; otherwise nothing.

Spans carry names, ids and counts, never prompts or outputs. The SDK sets up no provider and no exporter.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

from loramux._connection import View
from loramux._errors import LoramuxError
from loramux._methods import Method


class CallSpan(Protocol):
    """The span of one call, all attempts included."""

    def inject(self, metadata: list[tuple[str, str]]) -> None:
        """Add the trace context to the metadata of an attempt."""

    def attributes(self, **values: str | int) -> None:
        """Set attributes; `__` in a name stands for a dot."""

    def end(self, error: BaseException | None = None) -> None:
        """End it; only the first call counts."""


class _NoSpan:
    """Without OpenTelemetry."""

    def inject(self, metadata: list[tuple[str, str]]) -> None:
        """Add nothing."""

    def attributes(self, **values: str | int) -> None:
        """Set nothing."""

    def end(self, error: BaseException | None = None) -> None:
        """End nothing."""


_NO_SPAN = _NoSpan()


class _OtelSpan:
    """A span of the OpenTelemetry API."""

    def __init__(self, api: _Api, method: Method[Any, Any], view: View) -> None:
        self._api = api
        self._ended = False
        attributes = {"rpc.system.name": "grpc", "rpc.method": method.path[1:]}
        if method.name in ("Generate", "BatchGenerate"):
            attributes |= {"gen_ai.operation.name": "generate_content", "gen_ai.provider.name": "loramux"}
            if view.adapter is not None:
                attributes["gen_ai.request.model"] = view.adapter
        self._span = api.tracer.start_span(method.path[1:], kind=api.client_kind, attributes=attributes)

    def inject(self, metadata: list[tuple[str, str]]) -> None:
        """Add traceparent and what else the configured propagator has."""
        carrier: dict[str, str] = {}
        self._api.inject(carrier, context=self._api.set_span_in_context(self._span))
        metadata.extend((key.lower(), value) for key, value in carrier.items())

    def attributes(self, **values: str | int) -> None:
        """Set attributes."""
        for name, value in values.items():
            self._span.set_attribute(name.replace("__", "."), value)

    def end(self, error: BaseException | None = None) -> None:
        """End it, with the kind of error but not its text, which may be about a prompt."""
        if self._ended:
            return
        self._ended = True
        if error is not None:
            kind = error.reason or error.code if isinstance(error, LoramuxError) else type(error).__name__
            self._span.set_attribute("error.type", kind)
            self._span.set_status(self._api.error_status)
        self._span.end()


class _Api:
    """What is used of OpenTelemetry."""

    def __init__(self) -> None:
        from opentelemetry import propagate, trace

        self.tracer = trace.get_tracer("loramux")
        self.client_kind = trace.SpanKind.CLIENT
        self.error_status = trace.StatusCode.ERROR
        self.set_span_in_context = trace.set_span_in_context
        self.inject = propagate.inject


@functools.cache
def _api() -> _Api | None:
    """Load OpenTelemetry at the first call; None if it is not installed."""
    try:
        return _Api()
    except ImportError:
        return None


def start_span(method: Method[Any, Any], view: View) -> CallSpan:
    """Start the span of a call."""
    api = _api()
    return _NO_SPAN if api is None else _OtelSpan(api, method, view)
