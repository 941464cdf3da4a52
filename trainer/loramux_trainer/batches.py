"""Right-padded batches of training sequences."""

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from loramux_trainer.data.codec import IGNORED

ROWS_KEY = "rows"
"""Key of a batch under which the indices of its rows travel to the guards."""


class Collator:
    """Pads rows on the right; padding is masked and carries no loss.

    Args:
        pad_id: Id of the padding.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: SequenceOf[dict[str, Any]]) -> dict[str, Tensor]:
        """Build a batch.

        Args:
            rows: Each with `input_ids`, `labels` and `row`, its index.

        Returns:
            `input_ids`, `attention_mask`, `labels` `[B, T]` and `rows` `[B]`, int64.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self._pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[index, :length] = torch.tensor(row["input_ids"])
            attention_mask[index, :length] = 1
            labels[index, :length] = torch.tensor(row["labels"])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            ROWS_KEY: torch.tensor([row["row"] for row in rows]),
        }
