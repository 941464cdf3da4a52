"""Telemetry of one accepted generation: a gen_ai span with the engine's stamps as events, and the gen_ai metrics.

Holds ids, counts and times; never prompt, output or stop text.
"""

import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from loramux_server.engine.messages import Done, Started
from loramux_server.telemetry.metrics import Metrics

PROVIDER = "loramux"


class GenerationRecord:
    """One generation; `ended` must be called exactly once, whatever happened."""

    def __init__(
        self,
        metrics: Metrics,
        tracer: Tracer,
        *,
        generation_id: str,
        operation: str,
        model: str,
        prompt_tokens: int,
        received: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin the span.

        Args:
            metrics: Instruments.
            tracer: For the span; the RPC's span is its parent.
            generation_id: Span attribute.
            operation: `chat` or `text_completion`.
            model: Name of the base model.
            prompt_tokens: Length of the prompt.
            received: When the request arrived, on `clock`.
            clock: Monotonic seconds.
        """
        self._metrics = metrics
        self._clock = clock
        self._received = received
        self._first_token: float | None = None
        self._prompt_tokens = prompt_tokens
        self._cached_tokens: int | None = None
        self._output_tokens = 0
        self._outcome = "cancelled"
        self._error: str | None = None
        self._ended = False
        self._attributes: dict[str, str] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
        }
        self._span: Span = tracer.start_span(
            f"{operation} {model}",
            kind=SpanKind.INTERNAL,
            attributes={**self._attributes, "gen_ai.response.id": generation_id},
        )

    @property
    def span_context(self) -> trace.SpanContext:
        """Trace and span id, for logs."""
        return self._span.get_span_context()

    def started(self, event: Started) -> None:
        """Note that the engine admitted the request."""
        self._cached_tokens = event.cached_tokens
        self._span.add_event("queue", {"duration_s": event.queue_time})
        if event.version:
            self._span.set_attribute("loramux.adapter.version", event.version)
        if event.load_time > 0:
            self._span.add_event("load", {"duration_s": event.load_time})

    def tokens(self, count: int) -> None:
        """Note new output tokens."""
        self._output_tokens += count
        if self._first_token is None and count > 0:
            self._first_token = self._clock()
            self._span.add_event("first_token")

    def finished(self, reason: str) -> None:
        """Note that a sequence ended."""
        self._metrics.finished.add(1, {"reason": reason})

    def done(self, event: Done) -> None:
        """Note the engine's own times."""
        self._span.add_event("prefill", {"duration_s": event.prefill_time})
        self._span.add_event("decode", {"duration_s": event.decode_time})
        self._span.set_attribute("loramux.preemptions", event.preemptions)

    def usage(self, *, output_tokens: int, cancelled: bool) -> None:
        """Note the count that the caller gets; the generation is complete."""
        self._outcome = "cancelled" if cancelled else "finished"
        self._output_tokens = output_tokens

    def failed(self, reason: str) -> None:
        """Note why it failed."""
        self._outcome = "failed"
        self._error = reason

    def ended(self) -> None:
        """Record the metrics and end the span."""
        assert not self._ended, "a generation ends once"
        self._ended = True
        now = self._clock()
        attributes = dict(self._attributes)
        if self._error is not None:
            attributes["error.type"] = self._error
            self._span.set_status(Status(StatusCode.ERROR, self._error))
        self._metrics.generations.add(1, {"outcome": self._outcome})
        if self._cached_tokens is not None:
            counts = {"input": self._prompt_tokens, "cached": self._cached_tokens, "output": self._output_tokens}
            for kind, count in counts.items():
                self._metrics.tokens.add(count, {"type": kind, "outcome": self._outcome})
            self._span.set_attribute("gen_ai.usage.input_tokens", self._prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", self._output_tokens)
        self._metrics.request_duration.record(now - self._received, attributes)
        if self._outcome == "finished" and self._first_token is not None:
            self._metrics.first_token.record(self._first_token - self._received, attributes)
            if self._output_tokens > 1:
                after_first = (now - self._first_token) / (self._output_tokens - 1)
                self._metrics.output_token.record(after_first, attributes)
        self._span.set_attribute("loramux.outcome", self._outcome)
        self._span.end()
