"""The text exposition."""

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from loramux_server.telemetry.prometheus import metric_name, render


def test_what_is_rendered_can_be_read_back() -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider(metric_readers=[reader], shutdown_on_exit=False).get_meter("test")
    meter.create_counter("a.calls", unit="{call}", description="Line\nand \\").add(3, {"x.y": 'q"\\\n', "b": "c"})
    meter.create_up_down_counter("a.running").add(2)
    histogram = meter.create_histogram("a.time", unit="s", explicit_bucket_boundaries_advisory=(0.5, 1, 2.5))
    for value in (0.5, 0.6, 3):
        histogram.record(value)
    meter.create_observable_gauge("a.share", unit="1", callbacks=[])
    families = {family.name: family for family in text_string_to_metric_families(render(reader.get_metrics_data()))}
    (call,) = families["a_calls"].samples
    assert (call.name, call.value, call.labels) == ("a_calls_total", 3, {"x_y": 'q"\\\n', "b": "c"})
    assert families["a_running"].type == "gauge" and families["a_running"].samples[0].value == 2
    buckets = {sample.labels.get("le", sample.name): sample.value for sample in families["a_time_seconds"].samples}
    assert buckets == {
        "0.5": 1, "1": 2, "2.5": 2, "+Inf": 3, "a_time_seconds_sum": 4.1, "a_time_seconds_count": 3,
    }  # fmt: skip


def test_nothing_is_an_empty_text() -> None:
    assert render(None) == ""


def test_units_become_suffixes_once() -> None:
    assert metric_name("rpc.call.duration", "s", counter=False) == "rpc_call_duration_seconds"
    assert metric_name("x.bytes", "By", counter=True) == "x_bytes_total"
    assert metric_name("kv.usage", "1", counter=False) == "kv_usage_ratio"
