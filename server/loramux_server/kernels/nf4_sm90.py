"""The NF4 product on compute capability 9.0: `nf4_sm90.cu`, compiled for a few tile shapes, and how they are chosen.

M <= 64 rows of x are one tile of 8, 16, 32, 48 or 64; more are tiles of 64, each of which reads W again (from the
second on out of the L2 cache). Along N a tile takes 1, 2 or 4 blocks of 64; what is left of the four warpgroups splits
K, which suits narrow weights: every multiprocessor takes an equal share of all (tile, K) units, and the fewer share a
tile the cheaper its end.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from loramux_base import nf4
from loramux_server.kernels.capability import launches_overlap
from loramux_server.kernels.nf4 import BLOCK, BLOCK_BYTES, MOST_TILES, PackedNf4
from loramux_server.kernels.nvrtc import (
    CudaKernel,
    KernelError,
    TensorMap,
    load_kernel,
    tensor_map_3d,
    unavailable_reason,
)

_SOURCE = Path(__file__).with_suffix(".cu")
_ARCH = "sm_90a"
_TILE_ROWS = (8, 16, 32, 48, 64)
_THREADS = 640
_TABLE_BYTES = 65536
_SHARED_BYTES = 232448  # what a block of threads can have on 9.0
_BLOCKS_A_STAGE = 2  # along K, a warpgroup
_MOST_STAGES = 6
_LINEAR_ARGUMENTS = (None, *(ctypes.c_void_p,) * 6, *(ctypes.c_int,) * 4)
_DEQUANTIZE_ARGUMENTS = (*(ctypes.c_void_p,) * 3, *(ctypes.c_int,) * 2)


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a CUDA device, None if it can; found out by compiling a small one."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it is written for compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    reason = unavailable_reason()
    if reason is None:
        try:
            _dequantize_kernel()
        except KernelError as error:
            reason = str(error)
    return reason


def prepare(shape: tuple[int, int], device: torch.device) -> None:
    """`nf4.prepare`."""
    for rows in _TILE_ROWS:
        _linear_kernel(rows, _blocks_n(shape[0], rows, device))
    _dequantize_kernel()
    _pairs(device)
    nf4.levels(device)


def linear(x: Tensor, weight: PackedNf4, bias: Tensor | None, *, batch_invariant: bool) -> Tensor:
    """`nf4.nf4_linear` on CUDA."""
    rows, (n, k) = x.shape[0], weight.shape
    assert x.shape[1] == k and x.is_contiguous() and x.dtype == torch.bfloat16, "x is [M, K] bfloat16, contiguous"
    assert x.data_ptr() % 16 == 0, "x is 16-byte aligned"
    assert bias is None or bias.dtype == torch.bfloat16, "bias is bfloat16"
    out = torch.empty(rows, n, dtype=torch.bfloat16, device=x.device)
    # Where K is cut depends on the number of tiles: to be invariant, each is a launch of its own.
    most = _TILE_ROWS[-1] * (1 if batch_invariant else MOST_TILES)
    for first in range(0, rows, most):
        part = slice(first, first + most)
        _launch(x[part], weight, bias, out[part], tallest=batch_invariant)
    return out


def dequantize(weight: PackedNf4) -> Tensor:
    """`nf4.nf4_dequantize` to bfloat16 on CUDA."""
    n, k = weight.shape
    dense = torch.empty(n, k, dtype=torch.bfloat16, device=weight.blocks.device)
    levels = nf4.levels(dense.device)
    _dequantize_kernel().launch(
        (k // BLOCK, -(-n // BLOCK), 1),
        128,
        (weight.blocks.data_ptr(), levels.data_ptr(), dense.data_ptr(), n, k),
        stream=torch.cuda.current_stream(dense.device).cuda_stream,
    )
    return dense


def _launch(x: Tensor, weight: PackedNf4, bias: Tensor | None, out: Tensor, *, tallest: bool) -> None:
    rows, (n, k) = x.shape[0], weight.shape
    tile_rows = _TILE_ROWS[-1] if tallest else next((size for size in _TILE_ROWS if size >= rows), _TILE_ROWS[-1])
    blocks_n = _blocks_n(n, tile_rows, x.device)
    blocks_k = 4 // blocks_n * _BLOCKS_A_STAGE
    tiles = -(-n // (BLOCK * blocks_n)) * -(-rows // tile_rows)
    units = tiles * -(-k // (BLOCK * blocks_k))
    share = -(-units // _multiprocessors(x.device))
    grid = -(-units // share)
    sums = torch.empty(grid * 2 * blocks_n * 64 * tile_rows, dtype=torch.float32, device=x.device)
    _linear_kernel(tile_rows, blocks_n).launch(
        (grid, 1, 1),
        _THREADS,
        (
            _tensor_map(x.data_ptr(), rows, k, tile_rows, blocks_k),
            weight.blocks.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            sums.data_ptr(),
            weight.arrivals.data_ptr(),
            _pairs(x.device).data_ptr(),
            rows,
            n,
            k,
            share,
        ),
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )


def _blocks_n(n: int, tile_rows: int, device: torch.device) -> int:
    """Blocks of 64 rows of W a tile takes; measured on the shapes of a 7B, see bench/LOG.md."""
    blocks = -(-n // BLOCK)
    if blocks >= 4 * _multiprocessors(device):
        return 4
    return 2 if tile_rows > 32 or 2 * blocks > _multiprocessors(device) else 1


def _stages(tile_rows: int, blocks_n: int) -> int:
    stage = _BLOCKS_A_STAGE * (4 // blocks_n * tile_rows * 2 * BLOCK + 4 * BLOCK_BYTES)
    return min(_MOST_STAGES, (_SHARED_BYTES - _TABLE_BYTES - 256) // stage)


@functools.cache
def _linear_kernel(tile_rows: int, blocks_n: int) -> CudaKernel:
    stages = _stages(tile_rows, blocks_n)
    stage = _BLOCKS_A_STAGE * (4 // blocks_n * tile_rows * 2 * BLOCK + 4 * BLOCK_BYTES)
    constants = f"constexpr int BM = {tile_rows}, WN = {blocks_n}, ST = {stages};\n"
    return load_kernel(
        constants + _multiply16(tile_rows) + _SOURCE.read_text(encoding="utf-8"),
        "nf4_linear",
        arch=_ARCH,
        arguments=_LINEAR_ARGUMENTS,
        shared_bytes=_TABLE_BYTES + stages * (stage + 16) + 16,
        overlap=launches_overlap(),
    )


@functools.cache
def _dequantize_kernel() -> CudaKernel:
    constants = f"constexpr int BM = 8, WN = 4, ST = {_MOST_STAGES};\n"
    return load_kernel(
        constants + _multiply16(8) + _SOURCE.read_text(encoding="utf-8"),
        "nf4_dequantize",
        arch=_ARCH,
        arguments=_DEQUANTIZE_ARGUMENTS,
    )


def _multiply16(tile_rows: int) -> str:
    """The product of 64 x 16 values in registers with 16 x `tile_rows` in shared memory: a list of operands long."""
    count = tile_rows // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return f"""\
__device__ __forceinline__ void multiply16(float* sum, const unsigned* a, unsigned long long b, int add) {{
  asm volatile(
      "{{\\n.reg .pred add;\\nsetp.ne.b32 add, %{count + 5}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{tile_rows}k16.f32.bf16.bf16 "
      "{{{registers}}}, {{{a}}}, %{count + 4}, add, 1, 1, 0;\\n}}"
      : {sums} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}}
"""


@functools.lru_cache(maxsize=4096)
def _tensor_map(address: int, rows: int, k: int, tile_rows: int, blocks_k: int) -> TensorMap:
    """The tensor x as `[K / 64, M, 64]`, from which a stage takes a box of `[blocks_k, tile_rows, 64]`."""
    return tensor_map_3d(
        address, sizes=(BLOCK, rows, k // BLOCK), strides=(k * 2, BLOCK * 2), box=(BLOCK, tile_rows, blocks_k)
    )


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """`[256]` int32: the bfloat16 levels of both codes of a byte, the low code's in the low half."""
    levels = nf4.levels(torch.device("cpu")).to(torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack((levels[byte & 15], levels[byte >> 4]), dim=1).view(torch.int32).view(-1)
    # A copy that the host waits for: the kernel reads the table before what is right in front of it is over.
    return pairs.to(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
