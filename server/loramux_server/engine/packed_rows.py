"""A step plan as flat host arrays: what the eager batch and the static batch of captured graphs are both made of."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from loramux_server.engine.plan import StepPlan

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """T packed tokens of S rows, W pages in the longest of their page lists.

    Attributes:
        token_ids: `[T]` int64.
        positions: `[T]` int64.
        kv_slots: `[T]` int64, as in `ForwardBatch`.
        query_starts: `[S + 1]` int64.
        kv_lengths: `[S]` int64, after the step.
        page_tables: `[S, W]` int32, padded with 0.
        row_slots: `[S]` int32, slab slot of each row, -1 = base model.
    """

    token_ids: Array
    positions: Array
    kv_slots: Array
    query_starts: Array
    kv_lengths: Array
    page_tables: Array
    row_slots: Array

    @property
    def query_lengths(self) -> Array:
        """`[S]` int64, tokens of each row."""
        return np.diff(self.query_starts)

    @property
    def token_slots(self) -> Array:
        """`[T]` int32, slab slot of each token."""
        return np.repeat(self.row_slots, self.query_lengths)


def pack_rows(plan: StepPlan, page_size: int) -> PackedRows:
    """Flatten a plan.

    Args:
        plan: At least one row, each with at least one token.
        page_size: Tokens a page.
    """
    rows = plan.rows
    used = len(rows)
    counts = np.fromiter((len(row.token_ids) for row in rows), dtype=np.int64, count=used)
    starts = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(counts)))
    total = int(starts[-1])
    first = np.fromiter((row.start for row in rows), dtype=np.int64, count=used)
    # One position array for the packed batch: row start + offset inside the row.
    positions = np.arange(total, dtype=np.int64) + np.repeat(first - starts[:-1], counts)
    tables = np.zeros((used, max(len(row.pages) for row in rows)), dtype=np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row.pages)] = row.pages
    page, offset = np.divmod(positions, page_size)
    owner = np.repeat(np.arange(used), counts)
    token_ids = itertools.chain.from_iterable(row.token_ids for row in rows)
    return PackedRows(
        token_ids=np.fromiter(token_ids, dtype=np.int64, count=total),
        positions=positions,
        kv_slots=tables[owner, page].astype(np.int64) * page_size + offset,
        query_starts=starts,
        kv_lengths=first + counts,
        page_tables=tables,
        row_slots=np.fromiter((row.slot for row in rows), dtype=np.int32, count=used),
    )


def late_tokens(plan: StepPlan, query_starts: Array) -> tuple[Array, Array]:
    """Tokens that the step before samples: `[n]` int64 packed indices, and `[n]` int64 `RowPlan.source` of each."""
    late = [(query_starts[index], row.source) for index, row in enumerate(plan.rows) if row.source >= 0]
    places, sources = np.asarray(late, dtype=np.int64).reshape(-1, 2).T
    return places, sources


def sampled_tokens(plan: StepPlan, query_starts: Array) -> Array:
    """`[R]` int64: packed index of the last token of each sampled row, in plan order."""
    return np.asarray(
        [query_starts[index + 1] - 1 for index, row in enumerate(plan.rows) if row.sample], dtype=np.int64
    )


def lora_segments(token_slots: Array) -> list[Array]:
    """The four fields of `LoraBatch` from each token's slot; base tokens (-1) sort first.

    Args:
        token_slots: `[T]` int32.

    Returns:
        Token slots, order, segment slots, segment starts.
    """
    order = np.argsort(token_slots, kind="stable").astype(np.int32)
    slots, begins = np.unique(token_slots[order], return_index=True)
    return [
        token_slots,
        order,
        slots.astype(np.int32),
        np.append(begins, len(token_slots)).astype(np.int32),
    ]
