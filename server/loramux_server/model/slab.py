"""Adapter slab: the rank rows of all resident adapters, one allocation a linear group over all layers.

A slot is an adapter's place in the tables; a unit is 16 rank rows, the grain in which rows are given out. Who gets
which slot and rows is the scheduler's business; the slab copies and keeps the tables. Tables and rows are changed in
place, so that a captured graph sees them; the caller sees to it that no step that reads the slot is in flight. One
load at a time may run in another thread, and on another CUDA stream, than clears and steps.
"""

import dataclasses
import threading
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from loramux_base.adapter import (
    LINEAR_GROUPS,
    TENSORS_NAME,
    AdapterFormatError,
    AdapterLayout,
    BaseShapes,
    ModuleWeights,
    read_layout,
)
from loramux_server.kernels.batch import LoraGroup

UNIT_ROWS = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Resident:
    first_row: int
    rows: int
    ranks: dict[tuple[int, str], int]
    scales: dict[tuple[int, str], float]


class _Group:
    """One linear group over all layers (L): `a [L, slices, R, K]`, `b [L, R, N]`, tables `[L, slots, slices]`."""

    def __init__(
        self, base: BaseShapes, name: str, *, rows: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.modules = LINEAR_GROUPS[name]
        widths = {base.modules[module][0] for module in self.modules}
        assert len(widths) == 1, f"the modules of {name} share their input"
        ends = [0]
        for module in self.modules:
            ends.append(ends[-1] + base.modules[module][1])
        self.ends = tuple(ends)
        layers, slices = base.num_layers, len(self.modules)
        self.a = torch.zeros(layers, slices, rows, widths.pop(), dtype=dtype, device=device)
        self.b = torch.zeros(layers, rows, ends[-1], dtype=dtype, device=device)
        self.ranks = torch.zeros(layers, slots, slices, dtype=torch.int32, device=device)
        self.scales = torch.zeros(layers, slots, slices, dtype=torch.float32, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.a, self.b, self.ranks, self.scales)


class LoraSlab:
    """Rows and tables of the resident adapters.

    Args:
        base: Shapes of the base's linear layers.
        rank_units: Units of 16 rank rows to hold.
        max_slots: Most adapters resident at once.
        max_rank: Largest rank taken.
        dtype: Of the rows.
        device: Where they live.
        poison: Fill rows that belong to no adapter with NaN instead of zero, so that a stray read shows.
    """

    def __init__(
        self,
        base: BaseShapes,
        *,
        rank_units: int,
        max_slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        poison: bool = False,
    ) -> None:
        if rank_units < 1 or max_slots < 1 or max_rank < 1:
            raise ValueError("rank_units, max_slots and max_rank must be positive")
        self.base = base
        self.rank_units = rank_units
        self.max_slots = max_slots
        self.max_rank = max_rank
        self.dtype = dtype
        self.device = torch.device(device)
        self._poison = poison
        self._fill = float("nan") if poison else 0.0
        self._resident: dict[int, _Resident] = {}
        self._lock = threading.Lock()
        # A load on its own stream must not overtake the clear that freed its slot and rows.
        self._cleared = torch.cuda.Event() if self.device.type == "cuda" else None
        self._first_rows = torch.zeros(max_slots, dtype=torch.int32, device=self.device)
        rows = rank_units * UNIT_ROWS
        self._groups = {
            name: _Group(base, name, rows=rows, slots=max_slots, dtype=dtype, device=self.device)
            for name in LINEAR_GROUPS
        }
        if poison:
            for group in self._groups.values():
                group.a.fill_(self._fill)
                group.b.fill_(self._fill)
        self._views = {
            (layer, name): LoraGroup(
                a=group.a[layer],
                b=group.b[layer],
                slice_ends=group.ends[1:],
                first_rows=self._first_rows,
                ranks=group.ranks[layer],
                scales=group.scales[layer],
                max_rank=max_rank,
            )
            for name, group in self._groups.items()
            for layer in range(base.num_layers)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of rows and tables."""
        tensors = [tensor for group in self._groups.values() for tensor in group.tensors()]
        return sum(tensor.nbytes for tensor in (*tensors, self._first_rows))

    @property
    def resident_slots(self) -> frozenset[int]:
        """Slots that hold an adapter."""
        with self._lock:
            return frozenset(self._resident)

    def group(self, layer: int, name: str) -> LoraGroup:
        """Views of one group of one layer; the same object at every call."""
        return self._views[layer, name]

    def load(self, slot: int, first_unit: int, units: int, directory: Path) -> AdapterLayout:
        """Read an adapter into rows `[first_unit * 16, (first_unit + units) * 16)` and point `slot` at it.

        Everything is read and cast on the host first: a file that cannot be read leaves rows and tables as they were.

        Args:
            slot: Table entry; may be one that holds an adapter, which is then replaced.
            first_unit: First unit of its rows.
            units: Units it may use.
            directory: The PEFT directory.

        Returns:
            The layout of what was loaded.

        Raises:
            AdapterFormatError: The directory is no adapter for this base, needs more units than given, or holds a
                number that the slab's dtype cannot hold.
        """
        assert 0 <= slot < self.max_slots, f"slot {slot} of {self.max_slots}"
        assert first_unit >= 0 and units > 0 and first_unit + units <= self.rank_units, "units outside the slab"
        first_row, rows = first_unit * UNIT_ROWS, units * UNIT_ROWS
        layout = read_layout(directory, self.base, max_rank=self.max_rank)
        if layout.rank_units > units:
            raise AdapterFormatError(
                "ADAPTER_INCOMPATIBLE",
                "r",
                f"the adapter takes {layout.rank_units} rank units, {units} were set aside for it; load it again",
            )
        staged = self._stage(layout, rows, directory)
        loaded = _Resident(
            first_row=first_row,
            rows=rows,
            ranks={(part.layer, part.module): part.rank for part in layout.modules},
            scales={(part.layer, part.module): part.scale for part in layout.modules},
        )
        with self._lock:
            for other, held in self._resident.items():
                apart = first_row + rows <= held.first_row or held.first_row + held.rows <= first_row
                assert other == slot or apart, f"rows of slot {slot} overlap those of slot {other}"
            if self._cleared is not None:
                torch.cuda.current_stream(self.device).wait_event(self._cleared)
            self._forget(slot)
        # Not under the lock: the copies take long, and nobody else may touch these rows or this table entry now.
        span = slice(first_row, first_row + rows)
        for name, group in self._groups.items():
            a, b, ranks, scales = staged[name]
            # Contiguous pieces: a copy of the whole strided view would need as much device memory again.
            for layer in range(self.base.num_layers):
                group.b[layer, span].copy_(b[layer])
                for index in range(len(group.modules)):
                    group.a[layer, index, span].copy_(a[layer, index])
            group.ranks[:, slot].copy_(ranks)
            group.scales[:, slot].copy_(scales)
        self._first_rows[slot] = first_row
        with self._lock:
            self._resident[slot] = loaded
        return layout

    def clear(self, slot: int) -> None:
        """Take the adapter out of `slot`: every rank becomes 0. A slot that holds none stays as it is."""
        assert 0 <= slot < self.max_slots, f"slot {slot} of {self.max_slots}"
        with self._lock:
            self._forget(slot)
            if self._cleared is not None:
                self._cleared.record(torch.cuda.current_stream(self.device))

    def _forget(self, slot: int) -> None:
        held = self._resident.pop(slot, None)
        if held is None:
            return
        for group in self._groups.values():
            group.ranks[:, slot] = 0
            group.scales[:, slot] = 0
            # Nothing reads rows that no table entry names: only poison is worth the writes.
            if self._poison:
                group.a[:, :, held.first_row : held.first_row + held.rows] = self._fill
                group.b[:, held.first_row : held.first_row + held.rows] = self._fill
        self._first_rows[slot] = 0

    def check_integrity(self) -> None:
        """Compare the tables with what was loaded.

        Raises:
            AssertionError: Rows overlap or leave the slab, or a table entry differs.
        """
        with self._lock:
            self._check()

    def _check(self) -> None:
        spans = sorted((held.first_row, held.first_row + held.rows) for held in self._resident.values())
        assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False)), "rows overlap"
        assert not spans or spans[-1][1] <= self.rank_units * UNIT_ROWS, "rows leave the slab"
        first_rows = self._first_rows.tolist()
        for slot in range(self.max_slots):
            held = self._resident.get(slot)
            assert first_rows[slot] == (held.first_row if held else 0), f"first row of slot {slot}"
        for group in self._groups.values():
            ranks, scales = group.ranks.tolist(), group.scales.double().tolist()
            for layer in range(self.base.num_layers):
                for slot in range(self.max_slots):
                    held = self._resident.get(slot)
                    for index, module in enumerate(group.modules):
                        rank = held.ranks.get((layer, module), 0) if held else 0
                        scale = held.scales.get((layer, module), 0.0) if held else 0.0
                        where = f"layer {layer}, {module}, slot {slot}"
                        assert ranks[layer][slot][index] == rank, f"rank of {where}"
                        assert held is None or rank <= held.rows, f"rank past the rows of {where}"
                        assert abs(scales[layer][slot][index] - scale) <= 1e-6 * abs(scale), f"scale of {where}"

    def _stage(
        self, layout: AdapterLayout, rows: int, directory: Path
    ) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Host copies of an adapter's rows and table entries: a, b, ranks, scales a group."""
        layers = self.base.num_layers
        staged = {}
        parts: dict[tuple[int, str], ModuleWeights] = {(part.layer, part.module): part for part in layout.modules}
        with safe_open(directory / TENSORS_NAME, framework="pt") as file:
            for name, group in self._groups.items():
                slices = len(group.modules)
                a = torch.full((layers, slices, rows, group.a.shape[3]), self._fill, dtype=self.dtype)
                b = torch.full((layers, rows, group.b.shape[2]), self._fill, dtype=self.dtype)
                ranks = torch.zeros(layers, slices, dtype=torch.int32)
                scales = torch.zeros(layers, slices, dtype=torch.float32)
                for layer in range(layers):
                    for index, module in enumerate(group.modules):
                        part = parts.get((layer, module))
                        if part is None:
                            continue
                        columns = slice(group.ends[index], group.ends[index + 1])
                        a[layer, index, : part.rank] = self._cast(file.get_tensor(part.a_name), part.a_name)
                        b[layer, : part.rank, columns] = self._cast(file.get_tensor(part.b_name), part.b_name).T
                        ranks[layer, index] = part.rank
                        scales[layer, index] = part.scale
                staged[name] = (a, b, ranks, scales)
        return staged

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        cast = tensor.to(self.dtype)
        if not bool(torch.isfinite(cast).all()):
            raise AdapterFormatError(
                "ADAPTER_NUMERICS", name, f"tensor {name} holds a number that {self.dtype} cannot hold; scale it down"
            )
        return cast
