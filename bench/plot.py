"""Plots of the bench's JSON files. matplotlib is imported when something is drawn, so that runs need none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Row

Series = dict[str, list[tuple[int, float]]]


class NoMatplotlib(RuntimeError):
    """A plot was asked for where matplotlib is missing."""


def selected(rows: Sequence[Row]) -> list[Row]:
    """Rows of one sampling (the first) and, where both launch orders were measured, of steps launched ahead."""
    sampling = rows[0].sampling if rows else ""
    rows = [row for row in rows if row.mode == "burst" and row.decode > 0 and row.sampling == sampling]
    ahead = any(row.ahead for row in rows)
    return [row for row in rows if row.ahead in (ahead, None)]


def decode_series(rows: Sequence[Row]) -> Series:
    """Decode tok/s over concurrency, a line for each path, weights and adapters.

    A label names only what differs between the rows.
    """
    parts = {
        "path": [row.path for row in rows],
        "weights": [row.weights for row in rows],
        "adapters": [row.adapters if row.adapters == "base" else f"{row.adapters} adapters" for row in rows],
    }
    shown = [name for name, values in parts.items() if len(set(values)) > 1] or ["adapters"]
    series: Series = {}
    for index, row in enumerate(rows):
        label = ", ".join(parts[name][index] for name in shown if parts[name][index])
        series.setdefault(label, []).append((row.concurrency, row.decode))
    return {label: sorted(points) for label, points in series.items()}


def step_parts(rows: Sequence[Row], profiles: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by part: of each kernel profile, or where there is none of the host's own times.

    Args:
        rows: Rows of the engine in-process; those of the largest concurrency are taken.
        profiles: Steps of `profile_step.py --json`.
    """
    if profiles:
        return {
            f"{profile['rows']} rows, {profile['adapters'] or 'no'} adapters\n{profile['weights']}": profile["parts"]
            for profile in profiles
        }
    rows = [row for row in rows if row.parts]
    largest = max((row.concurrency for row in rows), default=0)
    return {
        f"{row.concurrency} rows, {row.adapters}\n{row.weights}": dict(row.parts)
        for row in rows
        if row.concurrency == largest
    }


def draw_serving(rows: Sequence[Row], path: Path, *, title: str, profiles: Sequence[Mapping[str, Any]] = ()) -> None:
    """Decode rate over concurrency, and the parts of a step.

    Args:
        rows: Of one card and one set of versions.
        path: PNG to write.
        title: Card and versions.
        profiles: Steps of `profile_step.py --json`.

    Raises:
        NoMatplotlib: It is not installed.
    """
    rows = selected(rows)
    figure, (rates, parts) = _figure(2, widths=(3, 2))
    for label, points in decode_series(rows).items():
        rates.plot([n for n, _ in points], [value for _, value in points], marker="o", label=label)
    _log2(rates, sorted({row.concurrency for row in rows}))
    rates.set_yscale("log")
    rates.set_xlabel("streams at once")
    rates.set_ylabel("decode tokens/s")
    rates.grid(alpha=0.3)
    rates.legend(fontsize=7)
    stacked = step_parts(rows, profiles)
    _stack(parts, stacked)
    parts.set_xlabel("ms a step by kernel" if profiles else "ms a step by part, host clock")
    rates.set_title(", ".join(sorted({_how(row) for row in rows})), fontsize=8)
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
    figure, axes = _figure(len(groups), widths=(1,) * len(groups))
    for axis, group in zip(axes, groups, strict=True):
        series: Series = {}
        for result in results:
            if result["group"] == group:
                series.setdefault(result["case"], []).append((result["rows"], result["us"] / result["floor_us"]))
        for label, points in series.items():
            points.sort()
            axis.plot([n for n, _ in points], [value for _, value in points], marker="o", markersize=3, label=label)
        _log2(axis, sorted({n for points in series.values() for n, _ in points}))
        axis.set_yscale("log")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(group, fontsize=9)
        axis.set_xlabel("rows")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    axes[0].set_ylabel("time / floor")
    _finish(figure, path, title)


def _how(row: Row) -> str:
    return row.sampling if row.ahead is None else f"{row.sampling}, {'one step ahead' if row.ahead else 'in step'}"


def _stack(axis: Any, stacked: Mapping[str, Mapping[str, float]]) -> None:
    names = list(dict.fromkeys(name for parts in stacked.values() for name in parts))
    lefts = [0.0] * len(stacked)
    for name in names:
        widths = [parts.get(name, 0.0) for parts in stacked.values()]
        axis.barh(list(stacked), widths, left=lefts, label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    if names:
        axis.legend(fontsize=7)


def _log2(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])


def _figure(columns: int, *, widths: Sequence[int]) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib("plots need matplotlib: pip install 'loramux[bench]'") from error
    figure = Figure(figsize=(5.5 * max(2, columns), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, width_ratios=widths, squeeze=False)[0]
    return figure, axes


def _finish(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=140)
