"""Memory of an engine by use: what was predicted, what it came to, and a table of both. Imports no torch.

Travels in `Ready.details` as `planned.*` and `actual.*`, decimal bytes and pages.
"""

import dataclasses
from collections.abc import Mapping

TOLERANCE = 0.05
"""How far a part may exceed its prediction before a warning is due."""

# Allocators round up; a difference this small means nothing.
_SLACK = 64 * 2**20

_GIB = 2**30
_PREFIXES = ("planned", "actual")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by use; None = not known.

    Attributes:
        weight_bytes: Base weights, embedding, rotary tables.
        adapter_bytes: Adapter slab with its tables, and what adapters are copied through on CUDA.
        kv_bytes: KV pages, the trash page included.
        step_bytes: Activations, graphs and workspaces: the most that was held for steps since the start.
        kv_pages: Usable pages.
    """

    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    step_bytes: int | None
    kv_pages: int

    def details(self, prefix: str) -> dict[str, str]:
        """As fields of `Ready.details`.

        Args:
            prefix: `planned` or `actual`.
        """
        return {f"{prefix}.{name}": str(value) for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def read(cls, details: Mapping[str, str], prefix: str) -> "Footprint | None":
        """From `Ready.details`; None where an engine reports none."""
        found = {
            field.name: int(details[f"{prefix}.{field.name}"])
            for field in dataclasses.fields(cls)
            if f"{prefix}.{field.name}" in details
        }
        try:
            return cls(**{"step_bytes": None, **found})  # type: ignore[arg-type]
        except TypeError:
            return None


_PARTS = (
    ("weight_bytes", "weights", "take --weights nf4 with --no-shadow, or a smaller base"),
    ("adapter_bytes", "adapter slab and staging", "lower --rank-units, --max-slots or --max-rank"),
    ("kv_bytes", "KV pages", "lower --kv-pages"),
    ("step_bytes", "activations, graphs, workspace", "lower --max-batch-tokens or --max-running"),
)


def memory_table(details: Mapping[str, str]) -> str:
    """Predicted against actual, a line a part; empty for an engine that reports neither.

    Args:
        details: Of its `Ready`.
    """
    planned, actual = (Footprint.read(details, prefix) for prefix in _PREFIXES)
    if planned is None or actual is None:
        return ""
    lines = [f"{'memory':32}{'predicted':>12}{'actual':>12}{'difference':>12}"]
    sums = [0, 0]
    for name, label, _ in _PARTS:
        there, here = getattr(planned, name), getattr(actual, name)
        lines.append(_line(f"{label} ({actual.kv_pages})" if name == "kv_bytes" else label, there, here))
        if there is not None and here is not None:
            sums = [sums[0] + there, sums[1] + here]
    lines.append(_line("together", *sums) if actual.step_bytes is not None else _line("together, without steps", *sums))
    if used := details.get("actual.device_bytes"):
        of = f" of {_size(int(total))}" if (total := details.get("device_bytes")) else ""
        lines.append(f"the device reports {_size(int(used))}{of} in use, by everyone")
    if resident := details.get("actual.process_bytes"):
        lines.append(f"the engine process has {_size(int(resident))} resident")
    return "\n".join(lines)


def warnings(planned: Footprint, actual: Footprint) -> list[str]:
    """A line for each part that takes over `TOLERANCE` more than predicted, and for pages that are missing."""
    lines = []
    for name, label, way_out in _PARTS:
        there, here = getattr(planned, name), getattr(actual, name)
        if there is not None and here is not None and here > there * (1 + TOLERANCE) and here - there > _SLACK:
            lines.append(
                f"memory: {label} take {_size(here)} where {_size(there)} were predicted, more than "
                f"{TOLERANCE:.0%} over: {way_out}"
            )
    if actual.kv_pages < planned.kv_pages * (1 - TOLERANCE):
        lines.append(
            f"memory: room for {actual.kv_pages} KV pages where {planned.kv_pages} were predicted: end what else uses "
            "the device, raise --gpu-memory-utilization, or lower --max-batch-tokens or --rank-units"
        )
    return lines


def _line(label: str, planned: int | None, actual: int | None) -> str:
    cells = [_size(value) if value is not None else "not known" for value in (planned, actual)]
    difference = f"{100 * (actual / planned - 1):+.1f} %" if planned and actual is not None else ""
    return f"{label:32}{cells[0]:>12}{cells[1]:>12}{difference:>12}".rstrip()


def _size(value: int) -> str:
    return f"{value / _GIB:.2f} GiB" if value >= _GIB else f"{value / 2**20:.1f} MiB"
