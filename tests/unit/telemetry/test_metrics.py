"""What the engine counts, as instruments: gauges of now, counters over all engine processes."""

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from loramux_server.engine.messages import Stats
from loramux_server.telemetry.metrics import EngineTotals, Metrics


def stats(**fields: int) -> Stats:
    numbers = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**numbers, "step_seconds": {}, **fields})  # type: ignore[arg-type]


def test_host_memory_is_measured() -> None:
    reader = InMemoryMetricReader()
    engine = EngineTotals()
    Metrics(
        MeterProvider(metric_readers=[reader], shutdown_on_exit=False).get_meter("test"),
        engine=engine,
        queued=lambda: 0,
        certificate=lambda: None,
    )
    engine.update(stats(host_hits=2, host_misses=3, host_prefetches=4))
    engine.engine_restarted()
    engine.update(
        stats(
            host_hits=10,
            host_misses=20,
            host_prefetches=30,
            host_bytes_used=5,
            host_bytes_total=7,
            distinct_adapters=6,
        )
    )
    found = reader.get_metrics_data()
    assert found is not None
    values = {
        metric.name: [point.value for point in metric.data.data_points]  # type: ignore[union-attr]
        for resource in found.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    assert [
        values[f"loramux.{name}"]
        for name in (
            "adapter.host.hits",
            "adapter.host.misses",
            "adapter.prefetches",
            "host_adapters.used",
            "host_adapters.limit",
            "step.adapters",
        )
    ] == [[12], [23], [34], [5], [7], [6]]
