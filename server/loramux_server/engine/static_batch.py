"""Batches of fixed shape at fixed addresses: what captured CUDA graphs read.

A plan is padded up to a rung of a ladder of token counts. Padding tokens have position 0, belong to no adapter and
write to page 0; in decode batches they are sequences of length 1 on page 0, in mixed batches they lie past the last
sequence. Segments and sequences have room for the most that a step may have, so that one kernel serves every mix.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from loramux_server.engine.packed_rows import Array, late_tokens, lora_segments, pack_rows, sampled_tokens
from loramux_server.engine.plan import StepPlan
from loramux_server.kernels.batch import ForwardBatch, LoraBatch

_RING = 3
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Key of a captured graph.

    Attributes:
        tokens: Packed tokens, padding included.
        decode: Every sequence has one token; else chunks are mixed in.
        lora: Any row uses an adapter.
        max_kv_length: Bound of KV lengths that sizes the attention's grid.
    """

    tokens: int
    decode: bool
    lora: bool
    max_kv_length: int


class StaticBatch:
    """Pinned host buffers, one static device buffer, and views of it by shape.

    Args:
        device: Where the model lives.
        max_tokens: Most packed tokens.
        max_sequences: Most sequences; no more than `max_tokens`.
        max_pages: Most pages of a sequence.
        max_segments: Most distinct slots in one batch, the base included.
        page_size: Tokens a page.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        max_tokens: int,
        max_sequences: int,
        max_pages: int,
        max_segments: int,
        page_size: int,
    ) -> None:
        assert max_sequences <= max_tokens, "a sequence in a step has a token"
        self._page_size = page_size
        self._max_sequences = max_sequences
        self._max_segments = max_segments
        counts = {
            "token_ids": (max_tokens, 8),
            "positions": (max_tokens, 8),
            "kv_slots": (max_tokens, 8),
            "logit_rows": (max_sequences, 8),
            "query_starts": (max_sequences + 1, 4),
            "kv_lengths": (max_sequences, 4),
            "token_slots": (max_tokens, 4),
            "order": (max_tokens, 4),
            "segment_slots": (max_segments, 4),
            "segment_starts": (max_segments + 1, 4),
            "late": (max_sequences, 8),
            "sources": (max_sequences, 8),
            "table": (max_sequences * max_pages, 4),  # last: copied as far as the plan's widest row reaches
        }
        self._spans: dict[str, tuple[int, int, int]] = {}
        position = 0
        for name, (count, width) in counts.items():
            self._spans[name] = (position, count, width)
            position += -(-count * width // _ALIGNMENT) * _ALIGNMENT
        cuda = device.type == "cuda"
        self._ring = [torch.zeros(position, dtype=torch.uint8, pin_memory=cuda) for _ in range(_RING)]
        self._events: list[torch.cuda.Event | None] = [None] * _RING
        self._turn = 0
        self._device_buffer = torch.zeros(position, dtype=torch.uint8, device=device)
        self._host_views = [{name: self._host_view(buffer, name) for name in counts} for buffer in self._ring]
        self._views = {name: self._device_view(name) for name in counts}
        self._table = torch.zeros(max_sequences, max_pages, dtype=torch.int32, device=device)

    def batch(self, shape: BatchShape) -> ForwardBatch:
        """The static tensors as a batch of this shape."""
        views = self._views
        sequences = self._sequences(shape)
        return ForwardBatch(
            token_ids=views["token_ids"][: shape.tokens],
            positions=views["positions"][: shape.tokens],
            kv_slots=views["kv_slots"][: shape.tokens],
            query_starts=views["query_starts"][: sequences + 1],
            kv_lengths=views["kv_lengths"][:sequences],
            page_tables=self._table[:sequences],
            logit_rows=views["logit_rows"][:sequences],
            lora=LoraBatch(
                token_slots=views["token_slots"][: shape.tokens],
                order=views["order"][: shape.tokens],
                segment_slots=views["segment_slots"],
                segment_starts=views["segment_starts"],
                num_segments=self._max_segments,
            )
            if shape.lora
            else None,
            max_query_length=1 if shape.decode else shape.tokens,
            max_kv_length=shape.max_kv_length,
            page_size=self._page_size,
        )

    def fill(self, plan: StepPlan, shape: BatchShape, sampled: Tensor | None = None) -> None:
        """Write a plan into the next host buffer, padded to the shape, and start its copy to the device.

        Args:
            plan: What to write.
            shape: Its graph's.
            sampled: `[R]` tokens that the step before has sampled, on the device; needed by rows with a `source`.
        """
        turn = self._turn = (self._turn + 1) % _RING
        pending = self._events[turn]
        if pending is not None:
            pending.synchronize()
        host = self._host_views[turn]
        packed = pack_rows(plan, self._page_size)
        used, width = packed.page_tables.shape
        total = len(packed.token_ids)
        tokens = shape.tokens
        sequences = self._sequences(shape)
        _put(host["token_ids"], packed.token_ids, tokens, 0)
        _put(host["positions"], packed.positions, tokens, 0)
        _put(host["kv_slots"], packed.kv_slots, tokens, 0)
        _put(host["logit_rows"], sampled_tokens(plan, packed.query_starts), sequences, 0)
        if shape.decode:
            host["query_starts"][: sequences + 1] = np.arange(sequences + 1)
        else:
            _put(host["query_starts"], packed.query_starts, sequences + 1, total)
        _put(host["kv_lengths"], packed.kv_lengths, sequences, 1)
        if shape.lora:
            slots = np.full(tokens, -1, dtype=np.int32)
            slots[:total] = packed.token_slots
            _, order, segment_slots, segment_starts = lora_segments(slots)
            host["token_slots"][:tokens] = slots
            host["order"][:tokens] = order
            _put(host["segment_slots"], segment_slots, self._max_segments, -1)
            _put(host["segment_starts"], segment_starts, self._max_segments + 1, tokens)
        late, sources = late_tokens(plan, packed.query_starts)
        host["late"][: len(late)], host["sources"][: len(late)] = late, sources
        host["table"][: used * width] = packed.page_tables.reshape(-1)
        end = self._spans["table"][0] + used * width * 4
        self._device_buffer[:end].copy_(self._ring[turn][:end], non_blocking=True)
        if len(late):
            assert sampled is not None, "a token is taken from no step"
            chosen = sampled.index_select(0, self._views["sources"][: len(late)])
            self._views["token_ids"].index_copy_(0, self._views["late"][: len(late)], chosen.to(torch.int64))
        # Columns past `width` keep what an earlier batch left there: nothing reads past a sequence's length.
        self._table[:used, :width].copy_(self._views["table"][: used * width].view(used, width))
        if used < sequences and shape.decode:
            self._table[used:sequences, :1].zero_()
        if self._device_buffer.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._events[turn] = event

    def _sequences(self, shape: BatchShape) -> int:
        return shape.tokens if shape.decode else self._max_sequences

    def _host_view(self, buffer: Tensor, name: str) -> Array:
        begin, count, width = self._spans[name]
        return buffer.numpy()[begin : begin + count * width].view(np.int64 if width == 8 else np.int32)

    def _device_view(self, name: str) -> Tensor:
        begin, count, width = self._spans[name]
        return self._device_buffer[begin : begin + count * width].view(torch.int64 if width == 8 else torch.int32)


def _put(target: Array, values: Array, size: int, padding: int) -> None:
    """Write values to the front of a buffer and fill it up to `size`."""
    assert len(values) <= size, f"{len(values)} entries of a batch in a graph that was captured with {size}"
    target[: len(values)] = values
    target[len(values) : size] = padding
