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
        learned: [T] int64, the flat places whose next token has a label. Made with the batch, since finding them on a
            GPU waits for it.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    learned: Tensor

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
            learned=self.learned.to(device),
        )


@dataclass(kw_only=True)
class _Row:
    items: list[tuple[list[int], list[int]]]
    used: int = 0


class _Packer:
    """Best fit among a bounded number of open rows of one length."""

    def __init__(self, *, rows: int, length: int, pad_id: int) -> None:
        self._rows = rows
        self._length = length
        self._pad_id = pad_id
        self._open: list[_Row] = []
        self._full: list[_Row] = []

    def add(self, ids: list[int], labels: list[int]) -> PackedBatch | None:
        """Take a conversation; returns a batch once one is full."""
        size = len(ids)
        fitting = [row for row in self._open if row.used + size <= self._length]
        if fitting:
            row = max(fitting, key=lambda row: row.used)
        else:
            if len(self._open) == _OPEN_ROWS:
                fullest = max(range(_OPEN_ROWS), key=lambda index: self._open[index].used)
                self._full.append(self._open.pop(fullest))
            row = _Row(items=[])
            self._open.append(row)
        row.items.append((ids, labels))
        row.used += size
        if len(self._full) < self._rows:
            return None
        batch, self._full = _batch(self._full, self._length, self._pad_id), []
        return batch


def pack(
    encoded: Iterator[tuple[list[int], list[int]]], *, rows: int, length: int, longest: int, pad_id: int
) -> Iterator[list[PackedBatch]]:
    """Pack an endless stream into the batches of optimizer steps.

    Attention costs a row's length for every token, and few conversations are long: they get longer rows of their own.

    Args:
        encoded: Ids and labels of conversations.
        rows: Rows of a batch.
        length: Tokens of a row.
        longest: Tokens of a row for conversations that are longer than `length`.
        pad_id: Fills the end of a row.

    Returns:
        One batch of short rows a step, and sometimes one of long rows, of about as many tokens, with it.

    Raises:
        ValueError: A conversation has more than `longest` tokens.
    """
    short = _Packer(rows=rows, length=length, pad_id=pad_id)
    long = _Packer(rows=max(1, rows * length // longest), length=longest, pad_id=pad_id)
    waiting: list[PackedBatch] = []
    for ids, labels in encoded:
        if len(ids) > longest:
            raise ValueError(f"a conversation has {len(ids)} tokens, the longest row {longest}; use longer rows")
        is_short = len(ids) <= length
        batch = (short if is_short else long).add(ids, labels)
        if batch is not None:
            waiting.append(batch)
            if is_short:
                yield waiting
                waiting = []


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
    # A conversation's first token has no label, so no place is the last of its row.
    learned = torch.nonzero(labels.flatten() != IGNORED).squeeze(1) - 1
    return PackedBatch(ids=ids, labels=labels, positions=positions, segments=segments, learned=learned)
