"""JSON log lines with the ids of the call they belong to. Never prompts or outputs: nothing here logs a request."""

import json
import logging
import sys
import time
from typing import TextIO

from opentelemetry import trace

from loramux_server.telemetry.context import CORRELATION_ID, GENERATION_ID

_MAX_MESSAGE = 8192


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, ids, stack if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MAX_MESSAGE],
        }
        if correlation_id := CORRELATION_ID.get():
            entry["correlation_id"] = correlation_id
        if generation_id := GENERATION_ID.get():
            entry["generation_id"] = generation_id
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            entry["trace_id"] = trace.format_trace_id(span.trace_id)
        if record.exc_info:
            entry["stack"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send all records of the process to one stream as JSON lines.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        stream: Default: standard error.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
