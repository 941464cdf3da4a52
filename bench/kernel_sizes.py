"""What a case of `kernel_cases.py` is, and the shapes that they measure on."""

import dataclasses
from collections.abc import Callable, Sequence

from kernel_results import Work
from kernel_timer import Call


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A model's shapes and what is measured on it.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocab: Tokens.
        rank: Of the adapters.
        max_rank: What the slab is laid out for.
        slots: Adapters in the slab.
        rows: Rows of decode steps.
        chunk: Rows of a prefill step, for LoRA and the small operations.
        contexts: Tokens in the cache of each sequence.
        linear_rows: Rows of the linear products.
        cache_bytes: What the operands of a case have to exceed together.
    """

    hidden: int = 3584
    intermediate: int = 18944
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 152064
    rank: int = 16
    max_rank: int = 64
    slots: int = 32
    rows: tuple[int, ...] = (1, 8, 32, 64)
    chunk: int = 512
    contexts: tuple[int, ...] = (512, 2048, 8192)
    linear_rows: tuple[int, ...] = (1, 8, 32, 64, 256, 512)
    cache_bytes: int = 256 * 2**20

    @property
    def linears(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Output widths of each slice, and input width, of the four linear groups."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": ((query, key, key), self.hidden),
            "o": ((self.hidden,), query),
            "gate_up": ((self.intermediate, self.intermediate), self.hidden),
            "down": ((self.hidden,), self.intermediate),
        }


SEVEN_B = Sizes()
"""Shapes of Qwen2.5-7B; the cache bound is five times the L2 of an H100."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation on one shape.

    Attributes:
        group: As `Result.group`.
        name: As `Result.case`.
        rows: As `Result.rows`.
        work: What it cannot do without.
        calls: Makes the calls; holds device memory only while they live.
        graph: Whether they can be captured.
    """

    group: str
    name: str
    rows: int
    work: Work
    calls: Callable[[], Sequence[Call]]
    graph: bool = True
