"""Times the backends of the NF4 product on a card, and makes of the times the choices of a tuning table."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import torch

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight
from loramux_server.model.linear import Backend, Linear, TuningRow, TuningTable
from loramux_server.model.spec import ModelSpec

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Row counts that are measured; a choice holds up to the next one."""

# What can be had together: the backends of our order of the bytes, and of the checkpoint's.
_ORDERS: tuple[tuple[Backend, ...], ...] = (("packed", "dequantize"), ("bitsandbytes", "dequantize"))

# Weights that a measurement rotates through: together larger than any cache, as the layers of a model are.
_ROTATING_BYTES = 512 * 2**20
_REPEATS = 5

Timer = Callable[[Backend, int, int, int], float]
"""(backend, N, K, M) -> seconds of one product."""


def product_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """`(N, K)` of the quantized products of a layer, each once."""
    inner, outer = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = [
        (inner + 2 * outer, spec.hidden_size),
        (spec.hidden_size, inner),
        (2 * spec.intermediate_size, spec.hidden_size),
        (spec.hidden_size, spec.intermediate_size),
    ]
    return list(dict.fromkeys(shapes))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds of each backend for one product."""

    n: int
    k: int
    m: int
    seconds: dict[Backend, float]

    def best(self, backends: Collection[Backend]) -> Backend:
        """The fastest of some backends."""
        here = [backend for backend in self.seconds if backend in backends]
        return min(here, key=lambda backend: self.seconds[backend])


def measure(
    shapes: Sequence[tuple[int, int]], timer: Timer, *, rows: Sequence[int] = ROWS, backends: Sequence[Backend]
) -> list[Measured]:
    """Time every backend for every shape and row count."""
    return [
        Measured(n=n, k=k, m=m, seconds={backend: timer(backend, n, k, m) for backend in backends})
        for n, k in shapes
        for m in rows
    ]


def choices(measured: Sequence[Measured]) -> list[TuningRow]:
    """The table: for each shape the fastest backend up to each row count, neighbours that agree joined.

    A weight's bytes are in one order, so a shape has our product or bitsandbytes', whichever is better over all row
    counts. The last choice of a shape holds for all larger row counts, too.
    """
    by_shape: dict[tuple[int, int], list[Measured]] = {}
    for one in sorted(measured, key=lambda one: (one.n, one.k, one.m)):
        by_shape.setdefault((one.n, one.k), []).append(one)
    return [row for (n, k), times in by_shape.items() for row in _rows(n, k, times)]


def _rows(n: int, k: int, times: Sequence[Measured]) -> list[TuningRow]:
    order = min(_ORDERS, key=lambda order: _slowness(times, order))
    rows: list[TuningRow] = []
    for one in times:
        best = one.best(order)
        if rows and rows[-1].backend == best:
            rows[-1] = dataclasses.replace(rows[-1], max_m=one.m)
        else:
            rows.append(TuningRow(n=n, k=k, max_m=one.m, backend=best))
    rows[-1] = dataclasses.replace(rows[-1], max_m=2**31 - 1)
    return rows


def _slowness(times: Sequence[Measured], order: Collection[Backend]) -> float:
    """Geometric mean, as a logarithm, of the fastest times to be had; infinite where there is none."""
    if not all(set(one.seconds) & set(order) for one in times):
        return math.inf
    return sum(math.log(one.seconds[one.best(order)]) for one in times)


class CudaTimer:
    """Times products in CUDA graphs over rotating weights, so that neither launches nor the cache flatter them.

    Args:
        device: The card.
        dtype: Compute dtype.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._shape: tuple[int, int] | None = None
        self._weights: list[Nf4Weight] = []

    def __call__(self, backend: Backend, n: int, k: int, m: int) -> float:
        """Seconds of one product, the best of several replays."""
        if self._shape != (n, k):
            self._shape, self._weights = (n, k), self._make(n, k)
        table = TuningTable([TuningRow(n=n, k=k, max_m=2**31 - 1, backend=backend)])
        layers = [Linear(weight, None, dtype=self._dtype, device=self._device, table=table) for weight in self._weights]
        x = torch.randn(m, k, device=self._device, dtype=self._dtype)

        def run() -> None:
            for layer in layers:
                layer(x)

        run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        best = float("inf")
        for _ in range(_REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1000 / len(layers))
        return best

    def _make(self, n: int, k: int) -> list[Nf4Weight]:
        count = max(2, _ROTATING_BYTES // (n * k // 2))
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=self._device)
        absmax = torch.rand(n, k // nf4.BLOCK_SIZE, device=self._device) / k
        return [
            Nf4Weight(codes=codes.clone(), absmax=absmax.clone(), source_dtype=self._dtype)
            for _ in range(min(count, 64))
        ]
