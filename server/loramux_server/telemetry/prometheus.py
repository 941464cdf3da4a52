"""Prometheus text exposition (format 0.0.4) of the metrics of an OpenTelemetry reader.

A reader of our own instead of the exporter package, whose collector registers itself in a process-wide registry: two
servers in one process would share it.
"""

import math
import re
from collections.abc import Iterable, Mapping

from opentelemetry.sdk.metrics.export import (
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    Sum,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_UNITS = {"s": "seconds", "By": "bytes", "1": "ratio"}
_NOT_IN_NAME = re.compile(r"[^a-zA-Z0-9_]")


def render(data: MetricsData | None) -> str:
    """Render all metrics; an empty collection is an empty text."""
    if data is None:
        return ""
    lines: list[str] = []
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                lines += _metric(metric)
    return "\n".join(lines) + "\n" if lines else ""


def metric_name(name: str, unit: str, *, counter: bool) -> str:
    """Return the Prometheus name of an instrument: dots to underscores, unit and `_total` as suffixes."""
    text = _NOT_IN_NAME.sub("_", name)
    suffix = _UNITS.get(unit)
    if suffix is not None and not text.endswith(f"_{suffix}"):
        text = f"{text}_{suffix}"
    return f"{text}_total" if counter else text


def _metric(metric: Metric) -> Iterable[str]:
    data = metric.data
    counter = isinstance(data, Sum) and data.is_monotonic
    name = metric_name(metric.name, metric.unit or "", counter=counter)
    kind = "histogram" if isinstance(data, Histogram) else "counter" if counter else "gauge"
    lines = [f"# HELP {name} {_help(metric.description or '')}", f"# TYPE {name} {kind}"]
    if isinstance(data, Sum | Gauge):
        for point in data.data_points:
            assert isinstance(point, NumberDataPoint)
            lines.append(f"{name}{_labels(point.attributes or {})} {_number(point.value)}")
    elif isinstance(data, Histogram):
        for bucket in data.data_points:
            assert isinstance(bucket, HistogramDataPoint)
            lines += _histogram(name, bucket)
    return lines


def _histogram(name: str, point: HistogramDataPoint) -> Iterable[str]:
    total = 0
    attributes = point.attributes or {}
    for bound, count in zip([*point.explicit_bounds, math.inf], point.bucket_counts, strict=True):
        total += count
        yield f"{name}_bucket{_labels(attributes, le=_number(bound))} {total}"
    yield f"{name}_sum{_labels(attributes)} {_number(point.sum)}"
    yield f"{name}_count{_labels(attributes)} {point.count}"


def _labels(attributes: Mapping[str, object], **extra: str) -> str:
    pairs = [(_NOT_IN_NAME.sub("_", key), str(value)) for key, value in sorted(attributes.items())]
    pairs += list(extra.items())
    if not pairs:
        return ""
    return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in pairs) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if float(value).is_integer() else repr(float(value))
