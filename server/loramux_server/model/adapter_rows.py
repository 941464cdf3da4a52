"""An adapter's rank rows in the order of the slab, in one piece of memory: what is stored, kept on the host and copied.

The piece is made of one block a layer, so that any run of layers can be copied as it is:

    A of each group [slices, rows, K] and B [rows, N], then of all groups: ranks [slices] int32, scales [slices] float32

Groups that the adapter does not touch are left out. `rows` is its largest rank: rows past a module's own rank are zero.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux_base.adapter import LINEAR_GROUPS, AdapterLayout, BaseShapes

# Every part of a block begins at a multiple of this, so that any dtype can be laid over it.
_ALIGNMENT = 16


class BadRows(ValueError):
    """Memory that should hold an adapter's rows does not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupRows:
    """One linear group over n layers.

    Attributes:
        a: `[n, slices, rows, K]`.
        b: `[n, rows, N]`.
        ranks: `[n, slices]` int32.
        scales: `[n, slices]` float32.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    scales: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A tensor inside the block of a layer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, blocks: Tensor) -> Tensor:
        part: Tensor = blocks[:, self.offset : self.end].view(self.dtype).unflatten(1, self.shape)
        return part


class RowsLayout:
    """Where everything is.

    Args:
        base: Shapes of the base's linear layers.
        dtype: Of the rows.
        rows: Rank rows; the adapter's largest rank.
        groups: Linear groups that are there, in the order of `LINEAR_GROUPS`.
    """

    def __init__(self, base: BaseShapes, *, dtype: torch.dtype, rows: int, groups: Sequence[str]) -> None:
        self.num_layers = base.num_layers
        self.dtype = dtype
        self.rows = rows
        self.groups = tuple(groups)
        assert rows > 0 and self.groups == tuple(name for name in LINEAR_GROUPS if name in self.groups)
        self._parts: dict[str, tuple[_Part, _Part, _Part, _Part]] = {}
        self.places: dict[str, tuple[str, int, slice]] = {}
        """Module -> its group, its index there, its columns of B."""
        end = 0
        for name in self.groups:
            modules = LINEAR_GROUPS[name]
            width = base.modules[modules[0]][0]
            outputs = 0
            for index, module in enumerate(modules):
                columns = slice(outputs, outputs + base.modules[module][1])
                self.places[module] = (name, index, columns)
                outputs = columns.stop
            a = _Part(end, (len(modules), rows, width), dtype)
            b = _Part(_aligned(a.end), (rows, outputs), dtype)
            ranks = _Part(_aligned(b.end), (len(modules),), torch.int32)
            scales = _Part(_aligned(ranks.end), (len(modules),), torch.float32)
            end = _aligned(scales.end)
            self._parts[name] = (a, b, ranks, scales)
        self.layer_bytes = end

    @classmethod
    def of(cls, base: BaseShapes, adapter: AdapterLayout, *, dtype: torch.dtype) -> "RowsLayout":
        """The layout that an adapter takes.

        Args:
            base: Shapes of the base's linear layers.
            adapter: What is in it.
            dtype: Of the rows.
        """
        there = {module.module for module in adapter.modules}
        groups = [name for name, modules in LINEAR_GROUPS.items() if there & set(modules)]
        return cls(base, dtype=dtype, rows=adapter.max_rank, groups=groups)

    @property
    def nbytes(self) -> int:
        """Bytes over all layers."""
        return self.num_layers * self.layer_bytes

    def views(self, memory: Tensor, layers: int | None = None) -> dict[str, GroupRows]:
        """Typed views of the groups.

        Args:
            memory: `[bytes]` uint8 that begins with the block of the first layer, at a multiple of 16 bytes.
            layers: Layers in it; None = all.

        Returns:
            Group -> its tensors, over the layers in `memory`.
        """
        count = self.num_layers if layers is None else layers
        blocks = memory[: count * self.layer_bytes].view(count, self.layer_bytes)
        return {
            name: GroupRows(a=a.of(blocks), b=b.of(blocks), ranks=ranks.of(blocks), scales=scales.of(blocks))
            for name, (a, b, ranks, scales) in self._parts.items()
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRows:
    """An adapter in host memory.

    Attributes:
        layout: Where its tensors are.
        memory: `[layout.nbytes]` uint8.
    """

    layout: RowsLayout
    memory: Tensor

    def ranks(self) -> dict[tuple[int, str], int]:
        """Rank by layer and module; modules that the adapter lacks are left out.

        Raises:
            BadRows: A rank is more than there are rows, or a scale is not finite.
        """
        ranks: dict[tuple[int, str], int] = {}
        for name, group in self.layout.views(self.memory).items():
            if not bool(torch.isfinite(group.scales).all()):
                raise BadRows("a scale is not finite")
            for layer, row in enumerate(group.ranks.tolist()):
                for module, rank in zip(LINEAR_GROUPS[name], row, strict=True):
                    if not 0 <= rank <= self.layout.rows:
                        raise BadRows(f"rank {rank} of {self.layout.rows} rows")
                    if rank:
                        ranks[layer, module] = rank
        return ranks

    def scales(self) -> dict[tuple[int, str], float]:
        """Scale by layer and module, as float32 holds it; 0 where the adapter has none."""
        scales: dict[tuple[int, str], float] = {}
        for name, group in self.layout.views(self.memory).items():
            rows = group.scales.tolist()
            for layer, (index, module) in itertools.product(range(len(rows)), enumerate(LINEAR_GROUPS[name])):
                scales[layer, module] = rows[layer][index]
        return scales


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
