# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `activation`: one program a row and block of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.activation import GELU_CUBE, GELU_SCALE, Kind
from loramux_server.kernels.overlap_triton import launch_options, wait_for_front

_BLOCK = 1024


@triton.jit
def _glu(
    gate_up,
    out,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SILU: tl.constexpr,
    SCALE: tl.constexpr,
    CUBE: tl.constexpr,
):
    wait_for_front()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    # 0.5 * (1 + tanh(u)) = sigmoid(2u)
    inner = gate if SILU else 2.0 * SCALE * (gate + CUBE * gate * gate * gate)
    activated = (gate / (1.0 + tl.exp(-inner))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (activated * up).to(out.dtype.element_ty), mask=inside)


def glu_triton(gate_up: Tensor, kind: Kind) -> Tensor:
    """Triton form of `glu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        _glu[(rows, triton.cdiv(width, block))](
            gate_up,
            out,
            gate_up.stride(0),
            WIDTH=width,
            BLOCK=block,
            SILU=kind == "silu",
            SCALE=GELU_SCALE,
            CUBE=GELU_CUBE,
            num_warps=4,
            **launch_options(),
        )
    return out
