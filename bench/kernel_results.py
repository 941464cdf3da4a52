"""Kernel times against what the card's memory and arithmetic allow, and the tables of them."""

import dataclasses
from collections.abc import Sequence

MEMORY_BYTES_PER_S = 3.35e12
"""HBM3 of an H100 SXM5, from NVIDIA's data sheet; a device copy reaches about nine tenths of it."""

BF16_FLOPS_PER_S = 989e12
"""Dense bfloat16 of an H100 SXM5's tensor cores, from NVIDIA's data sheet."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an operation cannot do without.

    Attributes:
        moved: Bytes that have to cross the memory bus once.
        flops: Floating-point operations, 2 a multiply-add.
    """

    moved: int
    flops: int = 0

    @property
    def floor(self) -> float:
        """Seconds that no kernel can beat on the card that the constants are of."""
        return max(self.moved / MEMORY_BYTES_PER_S, self.flops / BF16_FLOPS_PER_S)

    @property
    def bound(self) -> str:
        """What gives the floor: `memory` or `flops`."""
        return "memory" if self.moved / MEMORY_BYTES_PER_S >= self.flops / BF16_FLOPS_PER_S else "flops"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measured operation.

    Attributes:
        group: `lora`, `attention`, `sampler`, `small` or `linear`.
        case: Which operation on which shapes.
        rows: Tokens or sequences.
        us: Microseconds a call.
        floor_us: Microseconds of `Work.floor`.
        bound: `memory` or `flops`.
        moved: Bytes of `Work`.
        flops: Of `Work`.
        graph: Measured in a CUDA graph; else launched by the host.
    """

    group: str
    case: str
    rows: int
    us: float
    floor_us: float
    bound: str
    moved: int
    flops: int
    graph: bool = True


def result(*, group: str, case: str, rows: int, work: Work, seconds: float, graph: bool) -> Result:
    """A result from seconds."""
    return Result(
        group=group,
        case=case,
        rows=rows,
        us=1e6 * seconds,
        floor_us=1e6 * work.floor,
        bound=work.bound,
        moved=work.moved,
        flops=work.flops,
        graph=graph,
    )


def table(results: Sequence[Result]) -> str:
    """A Markdown table a group: cases down, rows across; each cell `us (times the floor)`."""
    parts = []
    for group in dict.fromkeys(result.group for result in results):
        mine = [result for result in results if result.group == group]
        rows = sorted({result.rows for result in mine})
        cells = {(result.case, result.rows): result for result in mine}
        lines = [
            f"**{group}**: us (x floor)",
            "",
            f"| case | {' | '.join(str(row) for row in rows)} |",
            "|---|" + "---|" * len(rows),
        ]
        lines += [
            f"| {case} | {' | '.join(_cell(cells.get((case, row))) for row in rows)} |"
            for case in dict.fromkeys(result.case for result in mine)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def layer_sums(results: Sequence[Result], *, group: str, products: int) -> list[tuple[str, int, float, float]]:
    """Microseconds of all products of a layer, by back end and rows: (back end, rows, us, floor us).

    Args:
        results: Cases named `<linear group> <back end>`.
        group: Which results.
        products: Products a layer; sums that lack one are left out.
    """
    sums: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        if one.group == group:
            sums.setdefault((one.case.split(" ", 1)[1], one.rows), []).append(one)
    return [
        (case, rows, sum(one.us for one in found), sum(one.floor_us for one in found))
        for (case, rows), found in sums.items()
        if len(found) == products
    ]


def _cell(found: Result | None) -> str:
    if found is None:
        return ""
    number = f"{found.us:,.0f}" if found.us >= 100 else f"{found.us:.1f}"
    host = "" if found.graph else " host"
    return f"{number} ({found.us / found.floor_us:.1f}){host}"
