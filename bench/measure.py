"""What a run gives: token times a stream, and the numbers of the table made from them. Seconds throughout."""

import dataclasses
import statistics
from collections.abc import Sequence


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        path: `engine` (in-process) or `grpc`.
        adapters: What the requests used, e.g. `base` or `32`.
        concurrency: Streams at once.
        decode: Output tokens/s while every stream decodes: from the last first token to the end.
        step_ms: Milliseconds a decode step: concurrency / decode.
        prefill: Prompt tokens/s until the last first token.
        output: Output tokens/s over the whole run, prefill included.
        ttft_p50: Median time to the first token, ms.
        ttft_p99: 99th percentile of it.
        gap_p50: Median time between deltas of a stream, ms.
        gap_p99: 99th percentile of it.
    """

    path: str
    adapters: str
    concurrency: int
    decode: float
    step_ms: float
    prefill: float
    output: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float


def summarize(streams: Sequence[StreamTimes], *, path: str, adapters: str) -> Row:
    """Numbers of one run in which all streams began together."""
    began = min(stream.begun for stream in streams)
    last_first = max(stream.first for stream in streams)
    ended = max(stream.arrivals[-1][0] for stream in streams)
    late = sum(count for stream in streams for at, count in stream.arrivals if at > last_first)
    decode = late / (ended - last_first) if ended > last_first else 0.0
    first = [stream.first - stream.begun for stream in streams]
    gaps = [
        after[0] - before[0]
        for stream in streams
        for before, after in zip(stream.arrivals, stream.arrivals[1:], strict=False)
    ]
    return Row(
        path=path,
        adapters=adapters,
        concurrency=len(streams),
        decode=decode,
        step_ms=1000 * len(streams) / decode if decode else 0.0,
        prefill=sum(stream.prompt_tokens for stream in streams) / (last_first - began),
        output=sum(stream.tokens for stream in streams) / (ended - began),
        ttft_p50=1000 * percentile(first, 50),
        ttft_p99=1000 * percentile(first, 99),
        gap_p50=1000 * percentile(gaps, 50),
        gap_p99=1000 * percentile(gaps, 99),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear-interpolated percentile; 0 for no values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| path | adapters | n | decode tok/s | ms/step | prefill tok/s | output tok/s "
        "| TTFT ms p50/p99 | gap ms p50/p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(row) for row in rows)])


def line(row: Row) -> str:
    """One row of the table."""
    cells = [
        row.path,
        row.adapters,
        str(row.concurrency),
        f"{row.decode:,.0f}",
        f"{row.step_ms:.2f}",
        f"{row.prefill:,.0f}",
        f"{row.output:,.0f}",
        f"{row.ttft_p50:.0f} / {row.ttft_p99:.0f}",
        f"{row.gap_p50:.1f} / {row.gap_p99:.1f}",
    ]
    return f"| {' | '.join(cells)} |"
