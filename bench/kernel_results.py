"""Kernel times against what the card's memory and arithmetic allow, and the tables of them."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card can do at most, from its data sheet; a device copy reaches about nine tenths of the memory's rate.

    Attributes:
        name: Part of the device's name.
        bytes_per_s: Of its memory.
        flops_per_s: Dense bfloat16 of its tensor cores.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float

    def __str__(self) -> str:
        return f"{self.name}: {self.bytes_per_s / 1e12:g} TB/s, {self.flops_per_s / 1e12:g} TFLOP/s"


H100 = Card(name="H100", bytes_per_s=3.35e12, flops_per_s=989e12)
CARDS = (H100, Card(name="H200", bytes_per_s=4.8e12, flops_per_s=989e12))
"""Cards whose floors are known, each the SXM5 board."""


def card_of(device: str) -> Card:
    """The card of a device's name; an H100 where it is unknown, so that figures stay comparable."""
    return next((card for card in CARDS if card.name in device), H100)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an operation cannot do without.

    Attributes:
        moved: Bytes that have to cross the memory bus once.
        flops: Floating-point operations, 2 a multiply-add.
    """

    moved: int
    flops: int = 0

    def floor(self, card: Card) -> float:
        """Seconds that no kernel can beat on a card."""
        return max(self.moved / card.bytes_per_s, self.flops / card.flops_per_s)

    def bound(self, card: Card) -> str:
        """What gives the floor: `memory` or `flops`."""
        return "memory" if self.moved / card.bytes_per_s >= self.flops / card.flops_per_s else "flops"


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


def result(*, group: str, case: str, rows: int, work: Work, seconds: float, graph: bool, card: Card = H100) -> Result:
    """A result from seconds, against the floor of a card."""
    return Result(
        group=group,
        case=case,
        rows=rows,
        us=1e6 * seconds,
        floor_us=1e6 * work.floor(card),
        bound=work.bound(card),
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
