"""One op for every linear layer: `y = x W^T + b`, by a backend that the tuning table picks for (N, K, M).

M rows of x, K input width, N output width. Backends:

- `dense`: W in the compute dtype. For NF4 bytes this is the *shadow*: their dequantized copy kept resident.
- `packed`: our own product of the NF4 bytes, which are kept in its order (CUDA, where `kernels.nf4` supports it).
- `bitsandbytes`: bitsandbytes' fused product of the NF4 bytes in the order of the checkpoint (CUDA).
- `dequantize`: the NF4 bytes expanded to the compute dtype in every call, then a dense product.

All compute the same function of the same weights: `dense` on a shadow and `dequantize` give equal bits; `bitsandbytes`
sums in another order; `packed` rounds the levels instead of level x maximum, and sums in another order.

Batch invariance. On the CPU, a row's result depends on the row count: measured with MKL on AVX-512, one row takes the
matrix-vector product, and rows are dealt to threads in pieces whose last 1 to 3 rows take another kernel. Padded to a
multiple of `row_multiple()` rows, every row had the same bits for every M from 1 to 600, with 1 to 4 threads. On CUDA
the library picks a kernel by M; there, blocks of a fixed number of rows are multiplied one by one, unless the product
is `packed`, which has the same bits for every M if asked.
"""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight
from loramux_server.kernels import nf4 as packing
from loramux_server.kernels.capability import row_multiple
from loramux_server.kernels.nf4 import PackedNf4, nf4_dequantize, nf4_linear

Backend = Literal["dense", "packed", "bitsandbytes", "dequantize"]

_log = logging.getLogger(__name__)

_CUDA_INVARIANT_ROWS = 64
# Beyond, reading W once for each 64 rows costs more than expanding it; measured on the shapes of a 7B.
_MOST_PACKED = 256


@functools.cache
def bitsandbytes_available() -> bool:
    """Whether bitsandbytes' fused NF4 product can be called; imports it, so ask only on CUDA."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TuningRow:
    """A measured choice.

    Attributes:
        n: Output width.
        k: Input width.
        max_m: Largest number of rows it holds for.
        backend: What was fastest.
    """

    n: int
    k: int
    max_m: int
    backend: Backend


class TuningTable:
    """Backend of an NF4 product by (N, K, M): measured rows first, then a heuristic.

    The heuristic on CUDA: our product up to 256 rows or, where it cannot run, bitsandbytes' up to 64, where reading
    4-bit weights pays; then dequantize + dense product. Elsewhere always dequantize.
    """

    def __init__(self, rows: Sequence[TuningRow] = ()) -> None:
        """Index the rows.

        Args:
            rows: In any order; for one (n, k), the smallest `max_m` that holds wins.
        """
        self._rows: dict[tuple[int, int], list[TuningRow]] = {}
        for row in sorted(rows, key=lambda row: row.max_m):
            self._rows.setdefault((row.n, row.k), []).append(row)

    def packs(self, n: int, k: int) -> bool:
        """Whether our product is to be had for a shape: the bytes are in one order, ours or the checkpoint's.

        Args:
            n: Output width.
            k: Input width.
        """
        return all(row.backend != "bitsandbytes" for row in self._rows.get((n, k), ()))

    def choose(self, n: int, k: int, m: int, device: torch.device, *, packed: bool = False) -> Backend:
        """Backend for a product.

        Args:
            n: Output width.
            k: Input width.
            m: Rows.
            device: Where it runs.
            packed: Whether the bytes are in the order of our product.
        """
        rows = self._rows.get((n, k), ())
        # What was measured for our order of the bytes says nothing of the checkpoint's.
        if packed or all(row.backend != "packed" for row in rows):
            for row in rows:
                if m <= row.max_m:
                    return row.backend
        if packed:
            return "packed" if m <= _MOST_PACKED else "dequantize"
        if device.type == "cuda" and m <= 64 and bitsandbytes_available():
            return "bitsandbytes"
        return "dequantize"


def packable(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our product takes a weight `[N, K]` of this shape here."""
    cause = packing.unsupported(device, dtype) or packing.shape_unsupported(shape)
    if cause is not None and device.type == "cuda":
        _log_not_packed(cause)
    return cause is None


@functools.cache
def _log_not_packed(cause: str) -> None:
    """Log once for each cause."""
    _log.info("NF4 products go without the packed one: %s", cause)


def dequantize(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight: by bitsandbytes' kernel on CUDA where it can be imported, else in torch; equal bits.

    Args:
        weight: Quantized weight.
        dtype: Of the result.
    """
    if not weight.codes.is_cuda or not bitsandbytes_available():
        return nf4.dequantize(weight, dtype)
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.codes.view(-1, 1), weight.absmax.view(-1), nf4.BLOCK_SIZE, "nf4", list(weight.shape), dtype
    )
    return dense


class Linear:
    """A (fused) linear layer on one device.

    Attributes:
        out_features: N.
        in_features: K.
        dtype: Compute dtype.
        bias: `[N]` or None.
    """

    def __init__(
        self,
        weight: Tensor | Nf4Weight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shadow: bool = False,
        batch_invariant: bool = False,
        table: TuningTable | None = None,
    ) -> None:
        """Place the weight on the device.

        Args:
            weight: `[N, K]`, dense or NF4.
            bias: `[N]`.
            dtype: Compute dtype.
            device: Of weight and products.
            shadow: Keep only the dequantized copy of an NF4 weight.
            batch_invariant: Make each row's result independent of the other rows.
            table: Backend choices for NF4 bytes; None = the heuristic alone.
        """
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.bias = None if bias is None else bias.to(device=device, dtype=dtype)
        self._dense: Tensor | None = None
        self._nf4: Nf4Weight | None = None
        self._packed: PackedNf4 | None = None
        self._table = table or TuningTable()
        if isinstance(weight, Tensor):
            self._dense = weight.to(device=device, dtype=dtype).contiguous()
        elif shadow:
            self._dense = dequantize(weight.to(device), dtype)
        elif self._table.packs(*weight.shape) and packable(weight.shape, dtype, device):
            self._packed = packing.pack(weight.to(device))
            packing.prepare(weight.shape, self._packed.blocks.device)
        else:
            self._nf4 = weight.to(device)
        self._device = device
        self._batch_invariant = batch_invariant

    @property
    def nbytes(self) -> int:
        """Resident bytes of weight and bias."""
        weight = self._dense.nbytes if self._dense is not None else 0
        codes = self._nf4.nbytes if self._nf4 is not None else 0
        codes += self._packed.nbytes if self._packed is not None else 0
        return weight + codes + (0 if self.bias is None else self.bias.nbytes)

    def backend(self, rows: int) -> Backend:
        """Which backend a product of so many rows takes."""
        if self._dense is not None:
            return "dense"
        packed = self._packed is not None
        if self._batch_invariant:
            # by (N, K) only: the choice of a kernel by the libraries depends on M
            return "packed" if packed else "dequantize"
        return self._table.choose(self.out_features, self.in_features, rows, self._device, packed=packed)

    def dense_weight(self) -> Tensor:
        """`[N, K]` in the compute dtype; computed when only the NF4 bytes are resident."""
        if self._dense is not None:
            return self._dense
        if self._packed is not None:
            return nf4_dequantize(self._packed, self.dtype)
        assert self._nf4 is not None
        return dequantize(self._nf4, self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The product.

        Args:
            x: `[M, K]` in the compute dtype.

        Returns:
            `[M, N]`.
        """
        backend = self.backend(x.shape[0])
        if backend == "packed":
            assert self._packed is not None
            return nf4_linear(x, self._packed, self.bias, batch_invariant=self._batch_invariant)
        if backend == "bitsandbytes":
            assert self._nf4 is not None
            result: Tensor = torch.ops.bitsandbytes.gemm_4bit(
                x,
                self._nf4.codes.view(-1, 1),
                [self.out_features, self.in_features],
                self._nf4.absmax.view(-1),
                nf4.BLOCK_SIZE,
                "nf4",
                self.bias,
            )
            return result
        weight = self.dense_weight()
        if not self._batch_invariant:
            return F.linear(x, weight, self.bias)
        if self._device.type == "cuda":
            return _linear_in_blocks(x, weight, self.bias, _CUDA_INVARIANT_ROWS)
        return linear_row_stable(x, weight, self.bias)


def linear_row_stable(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """CPU product in which a row's bits do not depend on the number of rows.

    Args:
        x: `[M, K]`.
        weight: `[N, K]`.
        bias: `[N]` or None.
    """
    rows = x.shape[0]
    padding = -rows % row_multiple()
    if not padding:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, padding)), weight, bias)[:rows]


def _linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """Product in row blocks of one size, the last padded with zeros."""
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % size))
    blocks = [F.linear(block, weight, bias) for block in padded.split(size)]
    return torch.cat(blocks)[:rows]
