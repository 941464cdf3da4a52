"""What a run gives: token times a stream, and the numbers of the table made from them. Seconds throughout."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(slots=True)
class StreamTimes:
    """Arrival times of one stream.

    Attributes:
        begun: When the request was sent.
        prompt_tokens: Prompt length.
        arrivals: (time, tokens) of each delta.
    """

    begun: float
    prompt_tokens: int
    arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> float:
        """Time of the first token."""
        return self.arrivals[0][0]

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(count for _, count in self.arrivals)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring deltas."""
        return [after[0] - before[0] for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        path: `engine` (in-process), `grpc`, `peft` or `vllm`.
        mode: `burst` (all requests at once, decode apart from prefill) or `closed` (each ended request replaced).
        weights: Weights as served, e.g. `nf4` or `nf4+shadow`.
        ahead: Whether steps were launched one ahead of their results; None = does not apply.
        sampling: `greedy`, `sampled` or `logprobs`.
        adapters: What the requests used, e.g. `base`, `32` or `zipf200/32`.
        concurrency: Streams at once.
        prompt: Prompt tokens a request.
        new: Output tokens a request.
        decode: Output tokens/s while every stream decodes: from the last first token to the end; 0 in a closed loop.
        step_ms: Milliseconds a decode step: concurrency / decode.
        prefill: Prompt tokens/s until the last first token; 0 in a closed loop.
        output: Output tokens/s over the whole run, prefill included.
        ttft_p50: Median time to the first token, ms.
        ttft_p99: 99th percentile of it.
        gap_p50: Median time between deltas of a stream, ms.
        gap_p99: 99th percentile of it.
        resident_weight_bytes: Base weights resident on the device; 0 = not known on this path.
        parts: Host milliseconds a step by part over this run, prefill steps included; empty where not known.
    """

    path: str
    mode: str = "burst"
    weights: str = ""
    ahead: bool | None = None
    sampling: str = "greedy"
    adapters: str
    concurrency: int
    prompt: int
    new: int
    decode: float
    step_ms: float
    prefill: float
    output: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    resident_weight_bytes: int = 0
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def adapter_count(self) -> int:
        """Distinct adapters where the label is a number, else 0."""
        return int(self.adapters) if self.adapters.isdecimal() else 0


def summarize(streams: Sequence[StreamTimes], *, path: str, adapters: str) -> Row:
    """Numbers of one run in which all streams began together."""
    began = min(stream.begun for stream in streams)
    last_first = max(stream.first for stream in streams)
    ended = max(stream.arrivals[-1][0] for stream in streams)
    late = sum(count for stream in streams for at, count in stream.arrivals if at > last_first)
    decode = late / (ended - last_first) if ended > last_first else 0.0
    return Row(
        path=path,
        adapters=adapters,
        concurrency=len(streams),
        prompt=max(stream.prompt_tokens for stream in streams),
        new=max(stream.tokens for stream in streams),
        decode=decode,
        step_ms=1000 * len(streams) / decode if decode else 0.0,
        prefill=sum(stream.prompt_tokens for stream in streams) / (last_first - began),
        output=sum(stream.tokens for stream in streams) / (ended - began),
        **_latencies(streams),
    )


def summarize_closed(streams: Sequence[StreamTimes], *, seconds: float, clients: int, path: str, adapters: str) -> Row:
    """Numbers of a closed loop: each of `clients` callers sent its next request when its last one had ended."""
    return Row(
        path=path,
        mode="closed",
        adapters=adapters,
        concurrency=clients,
        prompt=max(stream.prompt_tokens for stream in streams),
        new=max(stream.tokens for stream in streams),
        decode=0.0,
        step_ms=0.0,
        prefill=0.0,
        output=sum(stream.tokens for stream in streams) / seconds,
        **_latencies(streams),
    )


def _latencies(streams: Sequence[StreamTimes]) -> dict[str, float]:
    first = [stream.first - stream.begun for stream in streams]
    gaps = [gap for stream in streams for gap in stream.gaps]
    return {
        "ttft_p50": 1000 * percentile(first, 50),
        "ttft_p99": 1000 * percentile(first, 99),
        "gap_p50": 1000 * percentile(gaps, 50),
        "gap_p99": 1000 * percentile(gaps, 99),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear-interpolated percentile; 0 for no values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


_HEAD = (
    "path",
    "weights",
    "ahead",
    "sampling",
    "adapters",
    "n",
    "decode tok/s",
    "ms/step",
    "prefill tok/s",
    "output tok/s",
    "TTFT ms p50/p99",
    "gap ms p50/p99",
    "weights GiB",
)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
    return "\n".join([*head, *(line(row) for row in rows)])


def line(row: Row) -> str:
    """One row of the table."""
    closed = row.mode == "closed"
    cells = [
        f"{row.path} closed" if closed else row.path,
        row.weights,
        "" if row.ahead is None else "on" if row.ahead else "off",
        row.sampling,
        row.adapters,
        str(row.concurrency),
        "" if closed else f"{row.decode:,.0f}",
        "" if closed else f"{row.step_ms:.2f}",
        "" if closed else f"{row.prefill:,.0f}",
        f"{row.output:,.0f}",
        f"{row.ttft_p50:.0f} / {row.ttft_p99:.0f}",
        f"{row.gap_p50:.1f} / {row.gap_p99:.1f}",
        f"{row.resident_weight_bytes / 2**30:.2f}" if row.resident_weight_bytes else "",
    ]
    return f"| {' | '.join(cells)} |"


def parts_table(rows: Sequence[Row]) -> str:
    """Host milliseconds a step by part as a Markdown table, for the rows that have them; empty where none has."""
    rows = [row for row in rows if row.parts]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    head = ["path", "weights", "ahead", "sampling", "adapters", "n", *(f"{name} ms" for name in names)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        first = line(row).split(" | ")[:6]
        lines.append(f"{' | '.join(first)} | {' | '.join(f'{row.parts.get(name, 0.0):.2f}' for name in names)} |")
    return "\n".join(lines)
