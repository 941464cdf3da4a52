# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Triton form of `norm`: one program a row, so a row's bits do not depend on the others."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loramux_server.kernels.overlap_triton import launch_options, wait_for_front


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    out,
    total,
    x_stride,
    residual_stride,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDE_WEIGHT: tl.constexpr,
):
    wait_for_front()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        tl.store(total + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if WIDE_WEIGHT:  # noqa: SIM108 - one line would hide the two cast orders
        normed = normed * (scale + offset)
    else:
        normed = normed.to(out.dtype.element_ty).to(tl.float32) * scale
    tl.store(out + row * WIDTH + column, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Triton form of `rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, offset, out, None)
    return out


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Triton form of `add_rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, offset, out, total)
    return out, total


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, out: Tensor, total: Tensor | None
) -> None:
    """Run the kernel over the rows of x."""
    rows, width = x.shape
    if rows == 0:
        return
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        offset,
        WIDTH=width,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        WIDE_WEIGHT=offset != 0,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(),
    )
