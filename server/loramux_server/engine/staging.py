"""Turns a step plan into device tensors: everything a step needs crosses to the device in one copy.

The host side is a ring of pinned buffers (two or more, so that the next step is staged while the last copy may still be
read); the device side is one static buffer, so that a captured graph of the same bucket sizes finds its inputs at the
same addresses. On CPU both sides are the same memory.
"""

import itertools

import numpy as np
import torch

from loramux_server.engine.plan import StepPlan
from loramux_server.kernels.batch import ForwardBatch, LoraBatch

_ALIGNMENT = 16
_RING = 3


class BatchStaging:
    """Builds `ForwardBatch` from `StepPlan`.

    Args:
        device: Where the model lives.
        max_tokens: Most packed tokens of a step.
        max_sequences: Most rows of a step.
        max_pages: Most pages of one sequence.
        page_size: Tokens a page.
    """

    def __init__(
        self, *, device: torch.device, max_tokens: int, max_sequences: int, max_pages: int, page_size: int
    ) -> None:
        self._device = device
        self._page_size = page_size
        capacity = sum(
            _padded(count * width)
            for count, width in (
                (max_tokens, 8),  # token ids
                (max_tokens, 8),  # positions
                (max_tokens, 8),  # kv slots
                (max_tokens + max_sequences, 8),  # logit rows: sampled ones, and all when prompt logprobs are asked
                (max_sequences + 1, 4),  # query starts
                (max_sequences, 4),  # kv lengths
                (max_sequences * max_pages, 4),  # page tables
                (max_tokens, 4),  # token slots
                (max_tokens, 4),  # order
                (max_sequences + 1, 4),  # segment slots: base and one a sequence at most
                (max_sequences + 2, 4),  # segment starts
            )
        )
        cuda = device.type == "cuda"
        self._ring = [torch.empty(capacity, dtype=torch.uint8, pin_memory=cuda) for _ in range(_RING if cuda else 1)]
        self._events: list[torch.cuda.Event | None] = [None] * len(self._ring)
        self._static = torch.empty(capacity, dtype=torch.uint8, device=device) if cuda else self._ring[0]
        self._turn = 0

    def build(self, plan: StepPlan) -> ForwardBatch:
        """Stage a plan.

        Sampled rows come first in `logit_rows`, in plan order, then the rows whose prompt log-probabilities are asked.

        Returns:
            Views of the static device buffer, valid until the next call.
        """
        rows = plan.rows
        counts = np.fromiter((len(row.token_ids) for row in rows), dtype=np.int64, count=len(rows))
        starts = np.concatenate(([0], np.cumsum(counts)))
        total = int(starts[-1])
        first = np.fromiter((row.start for row in rows), dtype=np.int64, count=len(rows))
        lengths = first + counts
        # One position array for the packed batch: row start + offset inside the row.
        positions = np.arange(total, dtype=np.int64) + np.repeat(first - starts[:-1], counts)
        width = max(len(row.pages) for row in rows)
        tables = np.zeros((len(rows), width), dtype=np.int32)
        for index, row in enumerate(rows):
            tables[index, : len(row.pages)] = row.pages
        owner = np.repeat(np.arange(len(rows)), counts)
        page, offset = np.divmod(positions, self._page_size)
        fields: list[np.ndarray] = [
            np.fromiter(itertools.chain.from_iterable(row.token_ids for row in rows), dtype=np.int64, count=total),
            positions,
            tables[owner, page].astype(np.int64) * self._page_size + offset,
            _logit_rows(plan, starts),
            starts.astype(np.int32),
            lengths.astype(np.int32),
            tables,
        ]
        slots = np.fromiter((row.slot for row in rows), dtype=np.int32, count=len(rows))
        segments = 0
        if (slots >= 0).any():
            lora_fields = lora_segments(np.repeat(slots, counts))
            segments = len(lora_fields[2])
            fields.extend(lora_fields)
        tensors = self._send(fields)
        return ForwardBatch(
            token_ids=tensors[0],
            positions=tensors[1],
            kv_slots=tensors[2],
            logit_rows=tensors[3],
            query_starts=tensors[4],
            kv_lengths=tensors[5],
            page_tables=tensors[6],
            lora=LoraBatch(
                token_slots=tensors[7],
                order=tensors[8],
                segment_slots=tensors[9],
                segment_starts=tensors[10],
                num_segments=segments,
            )
            if segments
            else None,
            max_query_length=int(counts.max()),
            max_kv_length=int(lengths.max()),
            page_size=self._page_size,
        )

    def _send(self, fields: list[np.ndarray]) -> list[torch.Tensor]:
        """Pack the fields into the next host buffer and copy it to the static device buffer."""
        turn = self._turn = (self._turn + 1) % len(self._ring)
        pending = self._events[turn]
        if pending is not None:
            pending.synchronize()
        host = self._ring[turn].numpy()
        spans: list[tuple[int, int]] = []
        position = 0
        for field in fields:
            host[position : position + field.nbytes] = np.ascontiguousarray(field).reshape(-1).view(np.uint8)
            spans.append((position, position + field.nbytes))
            position += _padded(field.nbytes)
        if self._device.type == "cuda":
            self._static[:position].copy_(self._ring[turn][:position], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._events[turn] = event
        return [
            self._static[begin:end].view(torch.int64 if field.dtype == np.int64 else torch.int32).view(field.shape)
            for field, (begin, end) in zip(fields, spans, strict=True)
        ]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _logit_rows(plan: StepPlan, starts: np.ndarray) -> np.ndarray:
    wanted = [int(starts[index + 1]) - 1 for index, row in enumerate(plan.rows) if row.sample]
    for index, row in enumerate(plan.rows):
        if row.prompt_logprobs is not None:
            begin = int(starts[index])
            wanted.extend(range(begin, begin + len(row.prompt_targets)))
    return np.asarray(wanted, dtype=np.int64)


def lora_segments(token_slots: np.ndarray) -> list[np.ndarray]:
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
