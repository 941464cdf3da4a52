"""Instruments of the server. Names and buckets follow the OpenTelemetry conventions of gen_ai and rpc where they exist.

No label names a tenant or an adapter: their number has no bound. What the engine counts arrives in `Stats` and is read
by observable instruments; its counters start at zero with each engine process, so former processes are added up here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from loramux_server.engine.messages import Stats

DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
OUTPUT_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
RPC_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

_GAUGES: Mapping[str, tuple[str, str, Callable[[Stats], float]]] = {
    "loramux.requests.waiting": ("{request}", "Requests in the engine's queue.", lambda s: s.waiting),
    "loramux.requests.running": ("{request}", "Requests that generate.", lambda s: s.running),
    "loramux.kv.pages.used": ("{page}", "KV pages that running sequences hold.", lambda s: s.kv_pages_used),
    "loramux.kv.pages.cached": ("{page}", "KV pages that only the prefix cache holds.", lambda s: s.kv_pages_cached),
    "loramux.kv.pages.limit": ("{page}", "KV pages in all.", lambda s: s.kv_pages_total),
    "loramux.kv.usage": (
        "1",
        "Share of the KV pages that running sequences hold.",
        lambda s: s.kv_pages_used / s.kv_pages_total if s.kv_pages_total else 0.0,
    ),
    "loramux.slab.rank_units.used": ("{unit}", "Rank units of resident adapters.", lambda s: s.rank_units_used),
    "loramux.slab.rank_units.limit": ("{unit}", "Rank units in all.", lambda s: s.rank_units_total),
    "loramux.slab.versions": ("{version}", "Adapter versions on the device.", lambda s: s.resident_versions),
    "loramux.host_adapters.used": ("By", "Host memory that keeps adapters, used.", lambda s: s.host_bytes_used),
    "loramux.host_adapters.limit": ("By", "Host memory that keeps adapters, in all.", lambda s: s.host_bytes_total),
    "loramux.step.adapters": ("{adapter}", "Distinct adapters in the last step.", lambda s: s.distinct_adapters),
}

_COUNTERS: Mapping[str, tuple[str, str, Callable[[Stats], float]]] = {
    "loramux.prefix_cache.query.tokens": ("{token}", "Prompt tokens looked up.", lambda s: s.prefix_query_tokens),
    "loramux.prefix_cache.hit.tokens": ("{token}", "Prompt tokens found.", lambda s: s.prefix_hit_tokens),
    "loramux.adapter.loads": ("{load}", "Adapter loads into the slab.", lambda s: s.adapter_loads),
    "loramux.adapter.evictions": ("{eviction}", "Adapters evicted from the slab.", lambda s: s.adapter_evictions),
    "loramux.adapter.host.hits": ("{load}", "Loads that found the adapter on the host.", lambda s: s.host_hits),
    "loramux.adapter.host.misses": ("{load}", "Loads that waited for the adapter store.", lambda s: s.host_misses),
    "loramux.adapter.prefetches": ("{read}", "Adapters read before a load asked.", lambda s: s.host_prefetches),
    "loramux.preemptions": ("{preemption}", "Sequences preempted for pages.", lambda s: s.preemptions),
    "loramux.engine.steps": ("{step}", "Engine steps.", lambda s: s.steps),
    "loramux.engine.prefill.tokens": ("{token}", "Prompt tokens computed.", lambda s: s.prefill_tokens),
    "loramux.engine.decode.tokens": ("{token}", "Output tokens computed.", lambda s: s.decode_tokens),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateStats:
    """The listener's certificate.

    Attributes:
        expires: End of the one in use; Unix time.
        stale: Whether its files hold another that was refused.
        reloads: Certificates taken since the start.
    """

    expires: float
    stale: bool
    reloads: int


class EngineTotals:
    """The newest `Stats` and the sum of the counters of all former engine processes."""

    def __init__(self) -> None:
        """Start with no engine."""
        self.stats: Stats | None = None
        self._former: dict[str, float] = {}
        self._former_parts: dict[str, float] = {}

    def update(self, stats: Stats) -> None:
        """Take what the engine reported."""
        self.stats = stats

    def engine_restarted(self) -> None:
        """Add the counters of the process that ended to those of its predecessors."""
        if self.stats is None:
            return
        for name, (_, _, read) in _COUNTERS.items():
            self._former[name] = self._former.get(name, 0.0) + read(self.stats)
        for part, seconds in self.stats.step_seconds.items():
            self._former_parts[part] = self._former_parts.get(part, 0.0) + seconds
        self.stats = None

    def counter(self, name: str) -> float:
        """Total of a counter over all engine processes."""
        own = 0.0 if self.stats is None else _COUNTERS[name][2](self.stats)
        return self._former.get(name, 0.0) + own

    def step_seconds(self) -> dict[str, float]:
        """Seconds by part of a step, over all engine processes."""
        total = dict(self._former_parts)
        for part, seconds in ({} if self.stats is None else self.stats.step_seconds).items():
            total[part] = total.get(part, 0.0) + seconds
        return total


class Metrics:
    """Every instrument, created once on one meter."""

    def __init__(
        self,
        meter: Meter,
        *,
        engine: EngineTotals,
        queued: Callable[[], int],
        certificate: Callable[[], CertificateStats | None],
    ) -> None:
        """Create the instruments.

        Args:
            meter: Of the server's own provider.
            engine: What the engine reported.
            queued: Reads how many requests the front end holds before their start.
            certificate: Reads the state of the listener's certificate; None = plaintext.
        """
        self.rpc_duration = meter.create_histogram(
            "rpc.server.call.duration",
            unit="s",
            description="Duration of inbound calls.",
            explicit_bucket_boundaries_advisory=RPC_BUCKETS,
        )
        self.rpc_calls = meter.create_counter(
            "loramux.rpc.calls", unit="{call}", description="Calls that ended, by method, status code and reason."
        )
        self.request_duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            unit="s",
            description="Duration of generations.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        )
        self.first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            unit="s",
            description="Time from receipt to the first output token of successful generations.",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN_BUCKETS,
        )
        self.output_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            unit="s",
            description="Time per output token after the first of successful generations.",
            explicit_bucket_boundaries_advisory=OUTPUT_TOKEN_BUCKETS,
        )
        self.generations = meter.create_counter(
            "loramux.generations", unit="{generation}", description="Accepted generations that ended, by outcome."
        )
        self.finished = meter.create_counter(
            "loramux.sequences.finished", unit="{sequence}", description="Finished sequences, by reason."
        )
        self.tokens = meter.create_counter(
            "loramux.tokens", unit="{token}", description="Tokens of started generations, by type and outcome."
        )
        self.running_rpcs = meter.create_up_down_counter(
            "loramux.rpc.running", unit="{call}", description="Calls in progress."
        )
        meter.create_observable_gauge(
            "loramux.requests.queued",
            callbacks=[lambda _: [Observation(queued())]],
            unit="{request}",
            description="Requests that the front end holds before their start.",
        )
        _certificate_instruments(meter, certificate)
        for name, (unit, description, read) in _GAUGES.items():
            meter.create_observable_gauge(name, callbacks=[_gauge(engine, read)], unit=unit, description=description)
        for name, (unit, description, _) in _COUNTERS.items():
            meter.create_observable_counter(
                name, callbacks=[_counter(engine, name)], unit=unit, description=description
            )
        meter.create_observable_counter(
            "loramux.engine.step.time",
            callbacks=[lambda _: [Observation(s, {"part": part}) for part, s in engine.step_seconds().items()]],
            unit="s",
            description="Time of engine steps by part.",
        )


def _certificate_instruments(meter: Meter, read: Callable[[], CertificateStats | None]) -> None:
    def observe(value: Callable[[CertificateStats], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: [] if (stats := read()) is None else [Observation(value(stats))]

    meter.create_observable_gauge(
        "loramux.tls.certificate.expiry",
        callbacks=[observe(lambda stats: stats.expires)],
        unit="s",
        description="End of the listener's certificate, Unix time.",
    )
    meter.create_observable_gauge(
        "loramux.tls.certificate.stale",
        callbacks=[observe(lambda stats: float(stats.stale))],
        unit="{certificate}",
        description="1 while the certificate's files are refused and the last good one serves.",
    )
    meter.create_observable_counter(
        "loramux.tls.certificate.reloads",
        callbacks=[observe(lambda stats: stats.reloads)],
        unit="{reload}",
        description="Certificates taken since the start.",
    )


def _gauge(engine: EngineTotals, read: Callable[[Stats], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [] if engine.stats is None else [Observation(read(engine.stats))]

    return observe


def _counter(engine: EngineTotals, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: [Observation(engine.counter(name))]
