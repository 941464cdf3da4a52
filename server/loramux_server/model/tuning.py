"""Measured choices of the NF4 product's backend: the file that keeps them, and how they are measured.

A table holds for one card. `loramux-server tune` writes it into the user's cache, from where every server of that card
takes it; a card without one is served by the heuristic of `linear.TuningTable`.
"""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import torch

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight
from loramux_server.model.linear import Backend, Linear, TuningRow, TuningTable, bitsandbytes_available
from loramux_server.model.spec import ModelSpec

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Row counts that are measured; a choice holds up to the next one."""

VERSION = 1
# Weights that a measurement rotates through: together larger than any cache, as the layers of a model are.
_ROTATING_BYTES = 512 * 2**20
_REPEATS = 5

Timer = Callable[[Backend, int, int, int], float]
"""(backend, N, K, M) -> seconds of one product."""


class TuningFileError(ValueError):
    """A table that cannot be read; the message names the file and the way out."""


class _Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    n: int
    k: int
    max_m: int
    backend: Backend


class TuningFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table with what it was measured on.

    Attributes:
        version: Of this format.
        card: Name of the device.
        torch: Version of torch.
        rows: The choices.
    """

    version: int
    card: str
    torch: str
    rows: list[_Row]

    @classmethod
    def of(cls, card: str, rows: Iterable[TuningRow]) -> "TuningFile":
        """A table measured now, with this torch."""
        plain = [_Row(n=row.n, k=row.k, max_m=row.max_m, backend=row.backend) for row in rows]
        return cls(version=VERSION, card=card, torch=str(torch.__version__), rows=plain)

    def table(self) -> TuningTable:
        """The choices."""
        return TuningTable([TuningRow(n=row.n, k=row.k, max_m=row.max_m, backend=row.backend) for row in self.rows])

    def save(self, path: Path) -> None:
        """Write it; a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        scratch.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        scratch.replace(path)


def read_tuning(path: Path) -> TuningFile:
    """Read a table.

    Raises:
        TuningFileError: It is damaged, or of another format version.
    """
    way_out = "remove it or write a new one with `loramux-server tune`"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=TuningFile)
    except (OSError, msgspec.DecodeError) as error:
        raise TuningFileError(f"{path}: {error}; {way_out}") from error
    if found.version != VERSION:
        raise TuningFileError(f"{path}: format version {found.version} where {VERSION} is read; {way_out}")
    return found


def tuning_path(card: str) -> Path:
    """Where the table of a card is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "loramux" / "tuning" / f"{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"


def find_tuning(card: str) -> TuningTable | None:
    """The table of a card, None (said once) where there is none.

    Raises:
        TuningFileError: There is one that cannot be used.
    """
    path = tuning_path(card)
    if not path.is_file():
        logger.info("no tuning table for %s: products follow a heuristic; `loramux-server tune` measures them", card)
        return None
    table = read_tuning(path)
    here = cuda_backends()
    rows = [row for row in table.rows if row.backend in here]
    if len(rows) < len(table.rows):
        # A library may have gone since the table was measured: what chose its product follows the heuristic again.
        logger.warning("%s names backends that are not here, %s are; `loramux-server tune` measures again", path, here)
    return msgspec.structs.replace(table, rows=rows).table()


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

    @property
    def best(self) -> Backend:
        """The fastest."""
        return min(self.seconds, key=lambda backend: self.seconds[backend])


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

    The last choice of a shape holds for all larger row counts, too.
    """
    rows: list[TuningRow] = []
    for one in sorted(measured, key=lambda one: (one.n, one.k, one.m)):
        last = rows[-1] if rows else None
        if last is not None and (last.n, last.k, last.backend) == (one.n, one.k, one.best):
            rows[-1] = dataclasses.replace(last, max_m=one.m)
        else:
            rows.append(TuningRow(n=one.n, k=one.k, max_m=one.m, backend=one.best))
    largest = {(row.n, row.k): row.max_m for row in rows}
    return [dataclasses.replace(row, max_m=2**31 - 1) if row.max_m == largest[row.n, row.k] else row for row in rows]


def cuda_backends() -> list[Backend]:
    """Backends of an NF4 product that can be timed here."""
    return ["dequantize", *(["bitsandbytes"] if bitsandbytes_available() else [])]  # type: ignore[list-item]


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
