"""Conversations packed into rows of equal length; a mask keeps them apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux_demo.tokenizer import IGNORED

_OPEN_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows of several conversations each.

    Attributes:
        ids: [B, L] int64.
        labels: [B, L] int64, not shifted; `IGNORED` where there is no loss.
        positions: [B, L] int64, from 0 in each conversation.
        segments: [B, L] int64, number of the conversation in its row; padding has its own.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor

    def mask(self) -> Tensor:
        """[B, 1, L, L] bool: causal attention inside a conversation."""
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        length = self.ids.shape[1]
        return same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()

    def to(self, device: torch.device) -> "PackedBatch":
        """A copy on a device."""
        return PackedBatch(
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            positions=self.positions.to(device),
            segments=self.segments.to(device),
        )


@dataclass(kw_only=True)
class _Row:
    items: list[tuple[list[int], list[int]]]
    used: int = 0


def pack(
    encoded: Iterator[tuple[list[int], list[int]]], *, rows: int, length: int, pad_id: int
) -> Iterator[PackedBatch]:
    """Pack an endless stream, best fit among a bounded number of open rows.

    Args:
        encoded: Ids and labels of conversations.
        rows: Rows of a batch.
        length: Tokens of a row.
        pad_id: Fills the end of a row.

    Raises:
        ValueError: A conversation has more than `length` tokens.
    """
    open_rows: list[_Row] = []
    full: list[_Row] = []
    for ids, labels in encoded:
        size = len(ids)
        if size > length:
            raise ValueError(f"a conversation has {size} tokens, a row {length}; use longer rows")
        fitting = [row for row in open_rows if row.used + size <= length]
        if fitting:
            row = max(fitting, key=lambda row: row.used)
        else:
            if len(open_rows) == _OPEN_ROWS:
                fullest = max(range(_OPEN_ROWS), key=lambda index: open_rows[index].used)
                full.append(open_rows.pop(fullest))
            row = _Row(items=[])
            open_rows.append(row)
        row.items.append((ids, labels))
        row.used += size
        if len(full) == rows:
            yield _batch(full, length, pad_id)
            full = []


def _batch(rows: list[_Row], length: int, pad_id: int) -> PackedBatch:
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    segments = torch.full((len(rows), length), -1)
    for index, row in enumerate(rows):
        start = 0
        for number, (item_ids, item_labels) in enumerate(row.items):
            stop = start + len(item_ids)
            ids[index, start:stop] = torch.tensor(item_ids)
            labels[index, start:stop] = torch.tensor(item_labels)
            positions[index, start:stop] = torch.arange(stop - start)
            segments[index, start:stop] = number
            start = stop
    return PackedBatch(ids=ids, labels=labels, positions=positions, segments=segments)
