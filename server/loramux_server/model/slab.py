"""Adapter slab: the rank rows of all resident adapters, one allocation a linear group over all layers.

A slot is an adapter's place in the tables; a unit is 16 rank rows, the grain in which rows are given out. Who gets
which slot and rows is the scheduler's business; the slab copies and keeps the tables. Tables and rows are changed in
place, so that a captured graph sees them; the caller sees to it that no step that reads the slot is in flight. One
load at a time may run in another thread, and on another CUDA stream, than clears and steps.
"""

import dataclasses
import itertools
import threading
from pathlib import Path

import torch
from torch import Tensor

from loramux_base.adapter import LINEAR_GROUPS, AdapterFormatError, AdapterLayout, BaseShapes, read_layout
from loramux_server.kernels.batch import LoraGroup
from loramux_server.model.adapter_read import read_rows
from loramux_server.model.adapter_rows import AdapterRows, RowsLayout

UNIT_ROWS = 16
STAGING_BYTES = 64 << 20
"""Device memory through which rows arrive: many layers at once, and never less than the largest layer."""


def staging_bytes(base: BaseShapes, *, dtype: torch.dtype, max_rank: int) -> int:
    """Bytes of the staging memory on CUDA.

    Args:
        base: Shapes of the base's linear layers.
        dtype: Of the rows.
        max_rank: Rank of the largest adapter taken.
    """
    largest = RowsLayout(base, dtype=dtype, rows=max_rank, groups=tuple(LINEAR_GROUPS))
    return max(largest.layer_bytes, min(largest.nbytes, STAGING_BYTES))


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
        # Rows arrive here in one piece and are spread over the groups from here.
        self._staging: Tensor | None = None
        if self.device.type == "cuda":
            staging = staging_bytes(base, dtype=dtype, max_rank=max_rank)
            self._staging = torch.empty(staging, dtype=torch.uint8, device=self.device)
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
        """Bytes of rows, tables and staging memory."""
        tensors = [tensor for group in self._groups.values() for tensor in group.tensors()]
        staging = 0 if self._staging is None else self._staging.nbytes
        return sum(tensor.nbytes for tensor in (*tensors, self._first_rows)) + staging

    @property
    def resident_slots(self) -> frozenset[int]:
        """Slots that hold an adapter."""
        with self._lock:
            return frozenset(self._resident)

    def group(self, layer: int, name: str) -> LoraGroup:
        """Views of one group of one layer; the same object at every call."""
        return self._views[layer, name]

    def load(self, slot: int, first_unit: int, units: int, directory: Path) -> AdapterLayout:
        """Read an adapter and fill a slot with it; returns when it is there.

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
            OSError: It cannot be read.
        """
        adapter = read_layout(directory, self.base, max_rank=self.max_rank)
        layout = RowsLayout.of(self.base, adapter, dtype=self.dtype)
        memory = torch.empty(layout.nbytes, dtype=torch.uint8)
        read_rows(directory, adapter, layout, memory)
        self.fill(slot, first_unit, units, AdapterRows(layout=layout, memory=memory))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return adapter

    def fill(self, slot: int, first_unit: int, units: int, rows: AdapterRows) -> None:
        """Copy an adapter into rows `[first_unit * 16, (first_unit + units) * 16)` and point `slot` at it.

        On CUDA this only puts the copies on the current stream, behind the last `clear`: until they are over,
        `rows.memory` must stay as it is and no step may use the slot. When it fails, the slot holds nothing.

        Args:
            slot: Table entry; may be one that holds an adapter, which is then replaced.
            first_unit: First unit of its rows.
            units: Units it may use.
            rows: What to copy; of this base and dtype.

        Raises:
            AdapterFormatError: It needs more units than given.
            RuntimeError: The device failed.
        """
        layout = rows.layout
        assert 0 <= slot < self.max_slots, f"slot {slot} of {self.max_slots}"
        assert first_unit >= 0 and units > 0 and first_unit + units <= self.rank_units, "units outside the slab"
        assert layout.dtype == self.dtype and layout.num_layers == self.base.num_layers, "rows of another slab"
        needed = -(-layout.rows // UNIT_ROWS)
        if needed > units:
            raise AdapterFormatError(
                "ADAPTER_INCOMPATIBLE",
                "r",
                f"the adapter takes {needed} rank units, {units} were set aside for it; load it again",
            )
        first_row, count = first_unit * UNIT_ROWS, units * UNIT_ROWS
        loaded = _Resident(first_row=first_row, rows=count, ranks=rows.ranks(), scales=rows.scales())
        with self._lock:
            for other, held in self._resident.items():
                apart = first_row + count <= held.first_row or held.first_row + held.rows <= first_row
                assert other == slot or apart, f"rows of slot {slot} overlap those of slot {other}"
            if self._cleared is not None:
                torch.cuda.current_stream(self.device).wait_event(self._cleared)
            self._forget(slot)
        # Not under the lock: the copies take long, and nobody else may touch these rows or this table entry now.
        try:
            self._copy(slot, first_row, rows)
            self._fill_rest(first_row, first_row + count, loaded, layout)
            self._first_rows[slot] = first_row
        except BaseException:
            self._wipe(slot)
            raise
        with self._lock:
            self._resident[slot] = loaded

    def _copy(self, slot: int, first_row: int, rows: AdapterRows) -> None:
        layout = rows.layout
        at_once = self.base.num_layers
        if self._staging is not None:
            at_once = min(at_once, len(self._staging) // layout.layer_bytes)
        for begin in range(0, self.base.num_layers, at_once):
            layers = slice(begin, min(begin + at_once, self.base.num_layers))
            count = layers.stop - layers.start
            source = rows.memory[begin * layout.layer_bytes : layers.stop * layout.layer_bytes]
            if self._staging is not None:
                source = self._staging[: len(source)].copy_(source, non_blocking=True)
            for name, part in layout.views(source, count).items():
                group = self._groups[name]
                group.a[layers, :, first_row : first_row + layout.rows] = part.a
                group.b[layers, first_row : first_row + layout.rows] = part.b
                group.ranks[layers, slot] = part.ranks
                group.scales[layers, slot] = part.scales

    def _fill_rest(self, first_row: int, end: int, loaded: _Resident, layout: RowsLayout) -> None:
        """Overwrite what the adapter leaves of its rows: nobody else's numbers stay there."""
        for name, group in self._groups.items():
            begin = first_row + (layout.rows if name in layout.groups else 0)
            if begin < end:
                group.a[:, :, begin:end] = self._fill
                group.b[:, begin:end] = self._fill
            if not self._poison or name not in layout.groups:
                continue
            for layer, (index, module) in itertools.product(range(self.base.num_layers), enumerate(group.modules)):
                rest = slice(first_row + loaded.ranks.get((layer, module), 0), begin)
                group.a[layer, index, rest] = self._fill
                group.b[layer, rest, group.ends[index] : group.ends[index + 1]] = self._fill

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
        self._wipe(slot)
        # Nothing reads rows that no table entry names: only poison is worth the writes.
        if self._poison:
            for group in self._groups.values():
                group.a[:, :, held.first_row : held.first_row + held.rows] = self._fill
                group.b[:, held.first_row : held.first_row + held.rows] = self._fill

    def _wipe(self, slot: int) -> None:
        for group in self._groups.values():
            group.ranks[:, slot] = 0
            group.scales[:, slot] = 0
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
