"""Root mean square norm, alone or fused with the residual addition.

`rms_norm(x, weight, eps)`: x `[T, H]` (any row stride), weight `[H]`; returns `[T, H]` contiguous in x's dtype. Mean
and scaling are float32. The order of the casts is that of the checkpoint's family:

- `offset == 0` (llama): the normalised value is cast to x's dtype, then multiplied by the weight.
- `offset != 0` (gemma): multiplied by `offset + weight` in float32, then cast.

`add_rms_norm(x, residual, weight, eps)` first forms `residual + x` rounded to x's dtype, and returns the norm of that
sum together with the sum. Inputs are not modified. Each row's result depends on that row alone, bit by bit.
"""

import torch
from torch import Tensor

from loramux_server.kernels.capability import use_triton

_MAX_TRITON_WIDTH = 65536


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Normalise each row of x.

    Args:
        x: `[T, H]`.
        weight: `[H]`.
        eps: Added to the mean square.
        offset: Added to the weight; not 0 selects the gemma cast order.

    Returns:
        `[T, H]` in x's dtype.
    """
    if use_triton(x, "rms_norm", _unsupported(x)):
        from loramux_server.kernels.norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, offset=offset)
    return rms_norm_torch(x, weight, eps, offset=offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise the sum.

    Args:
        x: `[T, H]`, output of the previous block.
        residual: `[T, H]`.
        weight: `[H]`.
        eps: Added to the mean square.
        offset: As in `rms_norm`.

    Returns:
        The norm and the new residual, both `[T, H]` in x's dtype.
    """
    if use_triton(x, "add_rms_norm", _unsupported(x)):
        from loramux_server.kernels.norm_triton import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps, offset=offset)
    return add_rms_norm_torch(x, residual, weight, eps, offset=offset)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """Torch form of `rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (weight.float() + offset)).to(x.dtype)
    return normed.to(x.dtype) * weight


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Torch form of `add_rms_norm`."""
    total = residual + x
    return rms_norm_torch(total, weight, eps, offset=offset), total


def _unsupported(x: Tensor) -> str | None:
    """Name what the Triton form cannot take in x, None if nothing."""
    if x.shape[-1] > _MAX_TRITON_WIDTH:
        return f"hidden width {x.shape[-1]} is over {_MAX_TRITON_WIDTH}"
    if x.stride(-1) != 1:
        return "rows are not contiguous"
    return None
