"""Load gauges once more, under the names that Kubernetes inference gateways scrape by default.

Source: the model server protocol of the Gateway API Inference Extension (queued requests, running requests, KV cache
utilization). Its gauge of adapter names is left out: they are tenants' data.
"""

from collections.abc import Callable, Mapping

from loramux_server.engine.messages import Stats

_GAUGES: Mapping[str, tuple[str, Callable[[Stats, int], float]]] = {
    "vllm:num_requests_waiting": ("Requests that wait.", lambda stats, queued: max(stats.waiting, queued)),
    "vllm:num_requests_running": ("Requests that generate.", lambda stats, _: stats.running),
    "vllm:kv_cache_usage_perc": (
        "Share of the KV pages in use, 0 to 1.",
        lambda stats, _: stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0,
    ),
}


def render_gateway(stats: Stats | None, queued: int) -> str:
    """Render the gauges as Prometheus text; nothing without an engine.

    Args:
        stats: Newest statistics of the engine.
        queued: Requests that the front end holds before their start, those in the engine's queue included.
    """
    if stats is None:
        return ""
    lines: list[str] = []
    for name, (text, read) in _GAUGES.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", f"{name} {read(stats, queued):g}"]
    return "\n".join(lines) + "\n"
