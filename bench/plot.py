"""Plots of the bench's JSON files. matplotlib is imported when something is drawn, so that runs need none."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Row

Points = list[tuple[int, float]]
Key = tuple[str, str, str]
"""Path, weights, adapters of a line."""

_PATH_STYLES = {"engine": "-", "grpc": "--", "peft": ":", "vllm": "-."}
_MARKERS = "osD^v"
_GAPS = "gaps"


class NoMatplotlib(RuntimeError):
    """A plot was asked for where matplotlib is missing."""


def selected(rows: Sequence[Row]) -> list[Row]:
    """Rows of one sampling (the first) and, where both launch orders were measured, of steps launched ahead."""
    sampling = rows[0].sampling if rows else ""
    rows = [row for row in rows if row.mode == "burst" and row.decode > 0 and row.sampling == sampling]
    ahead = any(row.ahead for row in rows)
    return [row for row in rows if row.ahead in (ahead, None)]


def decode_series(rows: Sequence[Row]) -> dict[Key, Points]:
    """Decode tok/s over concurrency, a line for each path, weights and adapters."""
    series: dict[Key, Points] = {}
    for row in rows:
        series.setdefault((row.path, row.weights, row.adapters), []).append((row.concurrency, row.decode))
    return {key: sorted(points) for key, points in series.items()}


def series_labels(keys: Sequence[Key]) -> dict[Key, str]:
    """A label for each line, of what differs between them."""
    named = {key: (key[0], key[1], _adapters(key[2])) for key in keys}
    shown = [place for place in range(3) if len({names[place] for names in named.values()}) > 1] or [2]
    return {key: ", ".join(names[place] for place in shown if names[place]) for key, names in named.items()}


def parse_reference(text: str) -> tuple[str, Points]:
    """A line measured elsewhere, `LABEL=N:TOKENS_PER_S,...`, for example `vLLM 0.22=1:135,64:2125`.

    Raises:
        ValueError: It is written otherwise.
    """
    label, _, points = text.partition("=")
    try:
        found = [(int(n), float(rate)) for n, rate in (point.split(":") for point in points.split(","))]
    except ValueError:
        found = []
    if not label or not found or any(n < 1 or not 0 < rate < math.inf for n, rate in found):
        raise ValueError(f"{text!r}: give LABEL=STREAMS:TOKENS_PER_S,..., for example 'vLLM 0.22=1:135,64:2125'")
    return label, sorted(found)


def step_parts(rows: Sequence[Row], profiles: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by part: of each kernel profile, or where there is none of the host's own times.

    Args:
        rows: Rows of the engine in-process; those of the largest concurrency are taken.
        profiles: Steps of `profile_step.py --json`; their gaps come last.
    """
    if profiles:
        return {
            f"{profile['rows']} rows, {_adapters(str(profile['adapters'] or 'base'))}\n{profile['weights']}": {
                **profile["parts"],
                _GAPS: profile.get("gap_ms", 0.0),
            }
            for profile in profiles
        }
    rows = [row for row in rows if row.parts]
    largest = max((row.concurrency for row in rows), default=0)
    return {
        f"{row.concurrency} rows, {_adapters(row.adapters)}\n{row.weights}": dict(row.parts)
        for row in rows
        if row.concurrency == largest
    }


def draw_serving(
    rows: Sequence[Row],
    path: Path,
    *,
    title: str,
    profiles: Sequence[Mapping[str, Any]] = (),
    references: Sequence[tuple[str, Points]] = (),
) -> None:
    """Decode rate over concurrency, and the parts of a step.

    Args:
        rows: Of one card and one set of versions.
        path: PNG to write.
        title: Card and versions.
        profiles: Steps of `profile_step.py --json`.
        references: Lines measured elsewhere, as from `parse_reference`.

    Raises:
        NoMatplotlib: It is not installed.
    """
    rows = selected(rows)
    figure, (rates, parts) = _figure(1, 2, size=(14, 7.5), widths=(3, 2))
    series = decode_series(rows)
    labels = series_labels(list(series))
    # One hue an adapter mix, one dash a path, one marker a kind of weights: a dozen lines stay apart.
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(key[2] for key in series))}
    markers = dict(zip(dict.fromkeys(key[1] for key in series), _MARKERS, strict=False))
    for (way, weights, adapters), points in series.items():
        rates.plot(
            *zip(*points, strict=True),
            color=colors[adapters],
            linestyle=_PATH_STYLES.get(way, "-"),
            marker=markers.get(weights, "x"),
            markersize=5,
            label=labels[way, weights, adapters],
        )
    for index, (label, points) in enumerate(references):
        marker = "x+1"[index % 3]
        rates.plot(*zip(*points, strict=True), color="0.45", linestyle="-.", marker=marker, label=label)
    _log2(rates, sorted({row.concurrency for row in rows} | {n for _, points in references for n, _ in points}))
    _log10(rates)
    rates.set_xlabel("streams at once")
    rates.set_ylabel("decode rate, output tokens/s")
    rates.set_title(f"Decode rate ({', '.join(sorted({_how(row) for row in rows}))})", fontsize=10)
    rates.grid(which="major", alpha=0.3)
    _legend_below(rates, columns=3)
    _stack(parts, step_parts(rows, profiles))
    parts.set_title("One decode step by kernel" if profiles else "A step by part, prefill steps included", fontsize=10)
    parts.set_xlabel("ms a step" if profiles else "ms a step, host clock")
    _finish(figure, path, title)


def draw_profile(profiles: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Parts of a decode step and its gaps.

    Args:
        profiles: Steps of `profile_step.py --json`.
        path: PNG to write.
        title: Card and versions.

    Raises:
        NoMatplotlib: It is not installed.
    """
    stacked = {
        f"{label}\nstep {profile['step_ms']:.2f} ms\ngaps {profile['gap_share']:.1%}": parts
        for (label, parts), profile in zip(step_parts([], profiles).items(), profiles, strict=True)
    }
    figure, (axis,) = _figure(1, 1, size=(12, 2.4 + 0.9 * len(stacked)), widths=(1,))
    _stack(axis, stacked, columns=6)
    axis.set_xlabel("ms a step")
    axis.set_title("One decode step by kernel", fontsize=10)
    _finish(figure, path, title)


def draw_kernels(results: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Time against the floor for each kernel group: 1 is the floor.

    Args:
        results: Rows of `kernel_times.py --json`.
        path: PNG to write.
        title: Card and versions.

    Raises:
        NoMatplotlib: It is not installed.
    """
    groups = list(dict.fromkeys(result["group"] for result in results))
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = _figure(lines, columns, size=(6 * columns + 1, 6.5 * lines), widths=(1,) * columns)
    for axis, group in zip(axes, groups, strict=False):
        series: dict[str, Points] = {}
        for result in results:
            if result["group"] == group:
                series.setdefault(result["case"], []).append((result["rows"], result["us"] / result["floor_us"]))
        for index, (label, points) in enumerate(series.items()):
            style = ("-", "--", ":")[index // 10 % 3]
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, marker=_MARKERS[index % 5], markersize=4, linestyle=style, label=label)
        _log2(axis, sorted({n for points in series.values() for n, _ in points}))
        _log10(axis)
        axis.axhline(1.0, color="black", linewidth=1.0)
        axis.set_ylim(bottom=min(0.8, axis.get_ylim()[0]))
        axis.set_title(group, fontsize=10)
        axis.set_xlabel("rows (tokens or sequences) in a call")
        axis.set_ylabel("time / floor of memory or arithmetic")
        axis.grid(which="major", alpha=0.3)
        _legend_below(axis, columns=2)
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    _finish(figure, path, title)


def _adapters(label: str) -> str:
    return label if not label.isdecimal() else f"{label} adapter{'' if label == '1' else 's'}"


def _how(row: Row) -> str:
    return row.sampling if row.ahead is None else f"{row.sampling}, {'one step ahead' if row.ahead else 'in step'}"


def _stack(axis: Any, stacked: Mapping[str, Mapping[str, float]], *, columns: int = 3) -> None:
    names = list(dict.fromkeys(name for parts in stacked.values() for name in parts if name != _GAPS))
    names += [_GAPS] if any(parts.get(_GAPS) for parts in stacked.values()) else []
    lefts = [0.0] * len(stacked)
    for index, name in enumerate(names):
        widths = [parts.get(name, 0.0) for parts in stacked.values()]
        look = {"color": "white", "edgecolor": "0.6", "hatch": "//"} if name == _GAPS else {"color": f"C{index}"}
        axis.barh(list(stacked), widths, left=lefts, label=name, height=0.65, linewidth=0.5, **look)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for place, total in enumerate(lefts):
        axis.annotate(f" {total:.2f}", (total, place), va="center", fontsize=8)
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.invert_yaxis()
    if names:
        _legend_below(axis, columns=columns)


def _log2(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
    axis.minorticks_off()


def _log10(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _legend_below(axis: Any, *, columns: int) -> None:
    from matplotlib.transforms import ScaledTranslation

    below = axis.transAxes + ScaledTranslation(0, -0.5, axis.figure.dpi_scale_trans)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            fontsize=8,
            ncols=columns,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=below,
            frameon=False,
            handlelength=3,
        )


def _figure(lines: int, columns: int, *, size: tuple[float, float], widths: Sequence[int]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib("plots need matplotlib: pip install 'loramux[bench]'") from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, width_ratios=widths, squeeze=False).flatten()
    return figure, axes


def _finish(figure: Any, path: Path, title: str) -> None:
    width = int(11 * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=10)
    figure.savefig(path, dpi=130)
