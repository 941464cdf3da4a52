"""What `kernel_times.py` times: the operations of one layer and of the sampler on operands of a 7B, or of a tiny model.

A case gives its calls when it is asked, each on operands of its own, so many that they do not fit the card's cache
together: the layers of a model do not find their weights there either. T = tokens, N and K as in `model.linear`.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from kernel_results import Work
from kernel_sizes import Case, Sizes
from kernel_timer import Call
from torch import Tensor

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight
from loramux_server.engine.graphs import KV_LADDER
from loramux_server.engine.messages import SamplingSpec
from loramux_server.engine.packed_rows import lora_segments
from loramux_server.engine.plan import RowPlan
from loramux_server.engine.sampler import Sampler
from loramux_server.kernels.activation import glu
from loramux_server.kernels.attention import paged_attention
from loramux_server.kernels.batch import ForwardBatch, LoraBatch, LoraGroup
from loramux_server.kernels.lora import lora_add, plan_tiles
from loramux_server.kernels.norm import add_rms_norm, rms_norm
from loramux_server.kernels.rope import rope_and_write
from loramux_server.kernels.sampling import pick
from loramux_server.model.linear import Backend, Linear, TuningRow, TuningTable
from loramux_server.model.tuning import cuda_backends

_MOST_COPIES = 128
_PAGE = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Makes cases on one device.

    Attributes:
        sizes: Shapes.
        device: Where.
        dtype: Compute dtype.
    """

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype

    def cases(self, group: str) -> Iterator[Case]:
        """Cases of one of `GROUPS`."""
        makers: dict[str, Callable[[], Iterator[Case]]] = {
            "lora": self.lora,
            "attention": self.attention,
            "sampler": self.sampler,
            "small": self.small,
            "linear": self.linear,
        }
        return makers[group]()

    # --- LoRA ------------------------------------------------------------------------------------------------------

    def lora(self) -> Iterator[Case]:
        """Shrink, expand (on CUDA) and both, of each linear group; one adapter, and as many as there are slots."""
        sizes = self.sizes
        for name, (slices, width) in sizes.linears.items():
            for adapters in sorted({1, sizes.slots}):
                for rows in (*sizes.rows, sizes.chunk):
                    distinct = min(rows, adapters)
                    if adapters > 1 and distinct == 1:
                        continue
                    a = distinct * len(slices) * sizes.rank * width * self._size
                    b = distinct * sizes.rank * sum(slices) * self._size
                    x, out = rows * width * self._size, 2 * rows * sum(slices) * self._size
                    narrow = 4 * rows * len(slices) * sizes.rank
                    moved = {"shrink": a + x + narrow, "expand": b + out + narrow, "both": a + b + x + out}
                    label = "1 adapter" if adapters == 1 else f"{adapters} adapters"
                    for part in ("shrink", "expand", "both") if self.device.type == "cuda" else ("both",):
                        yield Case(
                            group="lora",
                            name=f"{name} {part}, {label}",
                            rows=rows,
                            work=Work(moved=moved[part]),
                            calls=self._lora_calls(part, slices, width, rows, distinct, moved["both"]),
                        )

    def _lora_calls(
        self, part: str, slices: tuple[int, ...], width: int, rows: int, distinct: int, moved: int
    ) -> Callable[[], list[Call]]:
        def make() -> list[Call]:
            return [self._lora_call(part, slices, width, rows, distinct, copy) for copy in range(self._copies(moved))]

        return make

    def _lora_call(self, part: str, slices: tuple[int, ...], width: int, rows: int, distinct: int, copy: int) -> Call:
        group, x = self._lora_group(slices, width), self._normal(rows, width)
        out = self._normal(rows, sum(slices))
        batch = self._lora_batch([(copy + row % distinct) % self.sizes.slots for row in range(rows)])
        if part == "both":
            return lambda: lora_add(x, out, group, batch)
        from loramux_server.kernels.lora_triton import Update

        update = Update(x, group, batch)
        update.shrink(x)
        return (lambda: update.shrink(x)) if part == "shrink" else (lambda: update.expand(out))

    def _lora_group(self, slices: tuple[int, ...], width: int) -> LoraGroup:
        sizes = self.sizes
        units = -(-sizes.rank // 16) * 16
        table = (sizes.slots, len(slices))
        return LoraGroup(
            a=self._normal(len(slices), sizes.slots * units, width),
            b=self._normal(sizes.slots * units, sum(slices)),
            slice_ends=tuple(int(end) for end in np.cumsum(slices)),
            first_rows=torch.arange(sizes.slots, dtype=torch.int32, device=self.device) * units,
            ranks=torch.full(table, sizes.rank, dtype=torch.int32, device=self.device),
            scales=torch.full(table, 2.0, dtype=torch.float32, device=self.device),
            max_rank=sizes.max_rank,
        )

    def _lora_batch(self, slots: Sequence[int]) -> LoraBatch:
        """Segments with room for every slot and the base, as captured graphs have them."""
        token_slots, order, used, starts = lora_segments(np.asarray(slots, dtype=np.int32))
        room = min(self.sizes.slots, len(slots)) + 1
        segment_slots = np.full(room, -1, dtype=np.int32)
        segment_starts = np.full(room + 1, len(slots), dtype=np.int32)
        segment_slots[: len(used)], segment_starts[: len(starts)] = used, starts
        return plan_tiles(
            LoraBatch(
                token_slots=self._send(token_slots),
                order=self._send(order),
                segment_slots=self._send(segment_slots),
                segment_starts=self._send(segment_starts),
                num_segments=room,
            )
        )

    # --- attention -------------------------------------------------------------------------------------------------

    def attention(self) -> Iterator[Case]:
        """Decode over rows and contexts, and two mixed steps."""
        sizes = self.sizes
        for context in sizes.contexts:
            for rows in sizes.rows:
                yield self._attention_case(f"decode, context {context}", [(1, context)] * rows, rows)
        decodes, chunk = max(sizes.rows) - 8, sizes.chunk - max(sizes.rows) + 8
        if decodes > 0 and chunk > 0:
            first = min(sizes.contexts)
            mixed = [(1, first)] * decodes + [(chunk, chunk)]
            yield self._attention_case(f"mixed, {decodes} decode rows + a chunk of {chunk}", mixed, decodes + chunk)
        prefill = [(sizes.chunk, sizes.chunk)] * 4
        yield self._attention_case(f"prefill, 4 x {sizes.chunk}", prefill, 4 * sizes.chunk)

    def _attention_case(self, name: str, sequences: Sequence[tuple[int, int]], rows: int) -> Case:
        """Sequences are (query tokens, tokens in the cache after the step)."""
        sizes = self.sizes
        heads = sizes.heads * sizes.head_dim
        cached = sum(length for _, length in sequences) * 2 * sizes.kv_heads * sizes.head_dim * self._size
        tokens = sum(count for count, _ in sequences)
        # Query i of a chunk of c that ends at length l sees l - c + 1 + i positions; two products.
        seen = sum(count * (length - count) + count * (count + 1) // 2 for count, length in sequences)
        work = Work(moved=cached + 2 * tokens * heads * self._size, flops=4 * heads * seen)

        def make() -> list[Call]:
            return [self._attention_call(sequences) for _ in range(self._copies(cached))]

        return Case(group="attention", name=name, rows=rows, work=work, calls=make)

    def _attention_call(self, sequences: Sequence[tuple[int, int]]) -> Call:
        sizes = self.sizes
        batch, pages = self._attention_batch(sequences)
        kv = self._normal(pages, 2, _PAGE, sizes.kv_heads, sizes.head_dim)
        q = self._normal(len(batch.positions), sizes.heads, sizes.head_dim)
        scale = sizes.head_dim**-0.5
        return lambda: paged_attention(q, kv, batch, scale=scale, window=None, softcap=None)

    def _attention_batch(self, sequences: Sequence[tuple[int, int]]) -> tuple[ForwardBatch, int]:
        """A batch whose pages lie scattered over the cache, and the cache's pages."""
        longest = max(length for _, length in sequences)
        bound = next((rung for rung in KV_LADDER if rung >= longest), longest)
        counts = [-(-length // _PAGE) for _, length in sequences]
        numbers = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1
        tables = np.zeros((len(sequences), -(-bound // _PAGE)), dtype=np.int32)
        for row, part in enumerate(np.split(numbers, np.cumsum(counts)[:-1])):
            tables[row, : len(part)] = part
        queries = np.asarray([count for count, _ in sequences])
        lengths = np.asarray([length for _, length in sequences])
        starts = np.concatenate(([0], np.cumsum(queries)))
        positions = np.concatenate([np.arange(length - count, length) for count, length in sequences])
        owner = np.repeat(np.arange(len(sequences)), queries)
        slots = tables[owner, positions // _PAGE].astype(np.int64) * _PAGE + positions % _PAGE
        batch = ForwardBatch(
            token_ids=self._send(np.zeros(len(positions), dtype=np.int64)),
            positions=self._send(positions.astype(np.int64)),
            kv_slots=self._send(slots),
            query_starts=self._send(starts.astype(np.int32)),
            kv_lengths=self._send(lengths.astype(np.int32)),
            page_tables=self._send(tables),
            logit_rows=self._send((starts[1:] - 1).astype(np.int64)),
            lora=None,
            max_query_length=int(queries.max()),
            max_kv_length=int(bound),
            page_size=_PAGE,
        )
        return batch, int(sum(counts)) + 1

    # --- sampler ---------------------------------------------------------------------------------------------------

    def sampler(self) -> Iterator[Case]:
        """The engine's sampler, called by the host as in a step, and its kernel in a graph; floor: the logits once."""
        fields: dict[str, dict[str, typing.Any]] = {
            "greedy": {"temperature": 0.0},
            "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
            "logprobs": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "logprobs": 3},
        }
        for name, spec in fields.items():
            for rows in self.sizes.rows:
                moved = rows * self.sizes.vocab * 4
                yield Case(
                    group="sampler",
                    name=name,
                    rows=rows,
                    work=Work(moved=moved),
                    calls=self._sampler_calls(rows, moved, spec),
                    graph=False,
                )
                if self.device.type == "cuda":
                    yield Case(
                        group="sampler",
                        name=f"{name}, kernel",
                        rows=rows,
                        work=Work(moved=moved),
                        calls=self._pick_calls(rows, moved, spec),
                    )

    def _sampler_calls(self, rows: int, moved: int, spec: dict[str, typing.Any]) -> Callable[[], list[Call]]:
        plans = [
            RowPlan(
                sequence_id=row,
                token_ids=[1],
                start=0,
                pages=[1],
                slot=-1,
                sample=True,
                sampling=SamplingSpec(max_tokens=8, seed=row, **spec),
                choice=0,
                position=1,
                history=[1],
                prompt_length=1,
            )
            for row in range(rows)
        ]

        def make() -> list[Call]:
            sampler = Sampler(vocab_size=self.sizes.vocab, device=self.device)
            copies = range(min(16, self._copies(moved)))
            logits = [self._normal(rows, self.sizes.vocab).float() * 4 for _ in copies]
            return [lambda one=one: sampler.sample(one, plans) for one in logits]  # type: ignore[misc]

        return make

    def _pick_calls(self, rows: int, moved: int, spec: dict[str, typing.Any]) -> Callable[[], list[Call]]:
        row = [spec["temperature"], spec.get("top_k", 0), spec.get("top_p", 1.0), 0.0]

        def make() -> list[Call]:
            parameters = torch.tensor([row] * rows, dtype=torch.float64, device=self.device)
            keys = torch.arange(rows, device=self.device)
            logits = [self._normal(rows, self.sizes.vocab).float() * 4 for _ in range(min(16, self._copies(moved)))]
            wanted = "logprobs" in spec
            return [lambda one=one: pick(one, one, parameters, keys, normaliser=wanted) for one in logits]  # type: ignore[misc]

        return make

    # --- norms, rotary embedding, activation -----------------------------------------------------------------------

    def small(self) -> Iterator[Case]:
        """Norms, rotary embedding with the cache write, and the gated activation."""
        sizes = self.sizes
        heads, kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        for rows in (*sizes.rows, sizes.chunk):
            row = rows * sizes.hidden * self._size
            widths = {
                "rms_norm": 2 * row,
                "add_rms_norm": 4 * row,
                "rope_and_write": 2 * rows * (heads + 2 * kv_heads) * self._size,
                "glu": 3 * rows * sizes.intermediate * self._size,
            }
            for name, moved in widths.items():
                yield Case(
                    group="small",
                    name=name,
                    rows=rows,
                    work=Work(moved=moved),
                    calls=self._small_calls(name, rows, moved),
                )

    def _small_calls(self, name: str, rows: int, moved: int) -> Callable[[], list[Call]]:
        sizes = self.sizes

        def rms() -> Call:
            x, weight = self._normal(rows, sizes.hidden), self._normal(sizes.hidden)
            return lambda: rms_norm(x, weight, 1e-6)

        def add_rms() -> Call:
            x, residual, weight = (self._normal(*shape) for shape in ((rows, sizes.hidden),) * 2 + ((sizes.hidden,),))
            return lambda: add_rms_norm(x, residual, weight, 1e-6)

        def rope() -> Call:
            batch, pages = self._attention_batch([(1, index + 1) for index in range(rows)])
            kv = self._normal(pages, 2, _PAGE, sizes.kv_heads, sizes.head_dim)
            cut = [sizes.heads, sizes.kv_heads, sizes.kv_heads]
            q, k, v = self._normal(rows, sum(cut), sizes.head_dim).split(cut, dim=1)
            table = torch.randn(max(rows, 2), 2, sizes.head_dim // 2, device=self.device)
            return lambda: rope_and_write(q, k, v, table, batch, kv)

        def activate() -> Call:
            gate_up = self._normal(rows, 2 * sizes.intermediate)
            return lambda: glu(gate_up, "silu")

        maker = {"rms_norm": rms, "add_rms_norm": add_rms, "rope_and_write": rope, "glu": activate}[name]
        # What such an operation reads was written just before it, so it may well come from the cache.
        return lambda: [maker() for _ in range(32)]

    # --- linear products -------------------------------------------------------------------------------------------

    def linear(self) -> Iterator[Case]:
        """The four products of a layer by every back end that is here."""
        backends: list[Backend] = ["dense", *(cuda_backends() if self.device.type == "cuda" else ["dequantize"])]
        for name, (slices, k) in self.sizes.linears.items():
            n = sum(slices)
            for backend in backends:
                layers: list[Linear] = []
                weight = n * k * self._size if backend == "dense" else n * k // 2 + n * k // nf4.BLOCK_SIZE * 4
                for rows in self.sizes.linear_rows:
                    yield Case(
                        group="linear",
                        name=f"{name} {backend}",
                        rows=rows,
                        work=Work(moved=weight + rows * (n + k) * self._size, flops=2 * rows * n * k),
                        calls=self._linear_calls(layers, backend, n, k, rows, weight),
                    )
                layers.clear()

    def _linear_calls(
        self, layers: list[Linear], backend: Backend, n: int, k: int, rows: int, weight: int
    ) -> Callable[[], list[Call]]:
        """Calls over layers that are made once and shared by the row counts."""

        def make() -> list[Call]:
            if not layers:
                table = TuningTable([TuningRow(n=n, k=k, max_m=2**31 - 1, backend=backend)])
                layers.extend(
                    Linear(self._weight(backend, n, k), None, dtype=self.dtype, device=self.device, table=table)
                    for _ in range(self._copies(weight))
                )
            x = self._normal(rows, k)
            return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]

        return make

    def _weight(self, backend: Backend, n: int, k: int) -> Tensor | Nf4Weight:
        if backend == "dense":
            return self._normal(n, k) * k**-0.5
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=self.device)
        absmax = torch.rand(n, k // nf4.BLOCK_SIZE, device=self.device) * k**-0.5
        return Nf4Weight(codes=codes, absmax=absmax, source_dtype=self.dtype)

    # --- operands --------------------------------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        return self.dtype.itemsize

    def _copies(self, moved: int) -> int:
        """Copies of the operands that exceed the cache together; at least two, so that none follows itself."""
        return max(2, min(_MOST_COPIES, -(-self.sizes.cache_bytes // max(1, moved))))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def _send(self, array: "np.ndarray[typing.Any, np.dtype[typing.Any]]") -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


GROUPS = ("lora", "attention", "sampler", "small", "linear")
"""What can be asked for, in the order in which it is measured."""
