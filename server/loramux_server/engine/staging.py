"""Turns a step plan into device tensors: everything a step needs crosses to the device in one copy.

The host side is a ring of pinned buffers (two or more, so that the next step is staged while the last copy may still be
read); the device side is one static buffer, so that a captured graph of the same bucket sizes finds its inputs at the
same addresses. On CPU both sides are the same memory.
"""

import numpy as np
import torch

from loramux_server.engine.packed_rows import Array, late_tokens, lora_segments, pack_rows, sampled_tokens
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
                (max_sequences, 8),  # late tokens: where they go
                (max_sequences, 8),  # and which sampled rows they come from
            )
        )
        cuda = device.type == "cuda"
        self._ring = [torch.empty(capacity, dtype=torch.uint8, pin_memory=cuda) for _ in range(_RING if cuda else 1)]
        self._events: list[torch.cuda.Event | None] = [None] * len(self._ring)
        self._static = torch.empty(capacity, dtype=torch.uint8, device=device) if cuda else self._ring[0]
        self._turn = 0

    def build(self, plan: StepPlan, sampled: torch.Tensor | None = None) -> ForwardBatch:
        """Stage a plan.

        Sampled rows come first in `logit_rows`, in plan order, then the rows whose prompt log-probabilities are asked.

        Args:
            plan: What to stage.
            sampled: `[R]` tokens that the step before has sampled, on the device; needed by rows with a `source`.

        Returns:
            Views of the static device buffer, valid until the next call.
        """
        packed = pack_rows(plan, self._page_size)
        fields = [
            packed.token_ids,
            packed.positions,
            packed.kv_slots,
            _logit_rows(plan, packed.query_starts),
            packed.query_starts.astype(np.int32),
            packed.kv_lengths.astype(np.int32),
            packed.page_tables,
        ]
        segments = 0
        if (packed.row_slots >= 0).any():
            lora_fields = lora_segments(packed.token_slots)
            segments = len(lora_fields[2])
            fields.extend(lora_fields)
        late, sources = late_tokens(plan, packed.query_starts)
        if len(late):
            fields.extend((late, sources))
        tensors = self._send(fields)
        if len(late):
            assert sampled is not None, "a token is taken from no step"
            tensors[0].index_copy_(0, tensors[-2], sampled.index_select(0, tensors[-1]).to(torch.int64))
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
            max_query_length=int(packed.query_lengths.max()),
            max_kv_length=int(packed.kv_lengths.max()),
            page_size=self._page_size,
        )

    def _send(self, fields: list[Array]) -> list[torch.Tensor]:
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


def _logit_rows(plan: StepPlan, query_starts: Array) -> Array:
    asked = [
        np.arange(query_starts[index], query_starts[index] + len(row.prompt_targets))
        for index, row in enumerate(plan.rows)
        if row.prompt_logprobs is not None
    ]
    return np.concatenate((sampled_tokens(plan, query_starts), *asked))
