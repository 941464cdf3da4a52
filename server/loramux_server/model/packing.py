"""Packed batches over a small private KV cache: for self-tests and tests; the engine's runner builds its own."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from loramux_server.kernels.batch import ForwardBatch, LoraBatch
from loramux_server.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens of one sequence in one step.

    Attributes:
        sequence: Number of the sequence.
        start: Position of the first token.
        token_ids: Tokens of the step.
        slot: Slab slot, -1 = base.
    """

    sequence: int
    start: int
    token_ids: Sequence[int]
    slot: int = -1


class PagedSequences:
    """KV caches and page tables of a fixed number of sequences; pages of different sequences interleave.

    Attributes:
        kv: One cache a layer, `[pages, 2, page_size, Hkv, D]`; starts as NaN, so that reading what was never written
            shows.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        sequences: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = 16,
    ) -> None:
        """Allocate.

        Args:
            spec: Flags of the model.
            sequences: How many.
            length: Longest of them.
            dtype: Of the caches.
            device: Of the caches.
            page_size: Tokens a page.
        """
        self._page_size = page_size
        self._device = device
        pages = -(-length // page_size)
        self._tables = [[1 + page * sequences + number for page in range(pages)] for number in range(sequences)]
        shape = (1 + sequences * pages, 2, page_size, spec.num_kv_heads, spec.head_dim)
        self.kv = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(spec.num_layers)]

    def pack(self, chunks: Sequence[Chunk], *, all_rows: bool = True) -> ForwardBatch:
        """Pack the chunks into one batch.

        Args:
            chunks: At most one a sequence.
            all_rows: Want logits of every token, else of the last of each chunk.
        """
        size = self._page_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        adapters: list[int] = []
        starts = [0]
        for chunk in chunks:
            table = self._tables[chunk.sequence]
            tokens += chunk.token_ids
            where = range(chunk.start, chunk.start + len(chunk.token_ids))
            positions += where
            slots += [table[position // size] * size + position % size for position in where]
            adapters += [chunk.slot] * len(chunk.token_ids)
            starts.append(len(tokens))
        lengths = [chunk.start + len(chunk.token_ids) for chunk in chunks]
        rows = list(range(len(tokens))) if all_rows else [start - 1 for start in starts[1:]]
        return ForwardBatch(
            token_ids=self._long(tokens),
            positions=self._long(positions),
            kv_slots=self._long(slots),
            query_starts=self._int(starts),
            kv_lengths=self._int(lengths),
            page_tables=self._int([self._tables[chunk.sequence] for chunk in chunks]),
            logit_rows=self._long(rows),
            lora=self._lora(adapters) if any(slot >= 0 for slot in adapters) else None,
            max_query_length=max(len(chunk.token_ids) for chunk in chunks),
            max_kv_length=max(lengths),
            page_size=size,
        )

    def _lora(self, adapters: Sequence[int]) -> LoraBatch:
        order = sorted(range(len(adapters)), key=lambda token: adapters[token])
        segments = sorted(set(adapters))
        starts = [0]
        for slot in segments:
            starts.append(starts[-1] + adapters.count(slot))
        return LoraBatch(
            token_slots=self._int(adapters),
            order=self._int(order),
            segment_slots=self._int(segments),
            segment_starts=self._int(starts),
            num_segments=len(segments),
        )

    def _long(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _int(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)
