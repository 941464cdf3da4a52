"""Gated activation of the MLP: `act(gate) * up`.

`glu(gate_up, kind)`: gate_up `[T, 2F]` (any row stride), the gate in the first F columns; kind "silu" or "gelu_tanh"
(the tanh approximation). Computed in float32, the activation rounded to the input dtype before the product as the
unfused form does. Returns `[T, F]` contiguous.

The torch form is written with exp and tanh because torch's own silu and gelu take another code path for the last
elements of a work range, so that a value's bits depended on where in the batch its row sits.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from loramux_server.kernels.capability import use_triton

Kind = Literal["silu", "gelu_tanh"]

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715


def glu(gate_up: Tensor, kind: Kind) -> Tensor:
    """Apply the gated activation.

    Args:
        gate_up: `[T, 2F]`.
        kind: Activation of the gate half.

    Returns:
        `[T, F]` in the dtype of gate_up.

    Raises:
        ValueError: kind is unknown.
    """
    if kind not in ("silu", "gelu_tanh"):
        raise ValueError(f"kind: unknown activation {kind!r}; use 'silu' or 'gelu_tanh'")
    if use_triton(gate_up, "glu", None if gate_up.stride(-1) == 1 else "rows are not contiguous"):
        from loramux_server.kernels.activation_triton import glu_triton

        return glu_triton(gate_up, kind)
    return glu_torch(gate_up, kind)


def glu_torch(gate_up: Tensor, kind: Kind) -> Tensor:
    """Torch form of `glu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    if kind == "silu":
        activated = torch.neg(wide).exp_().add_(1.0)
        torch.div(wide, activated, out=activated)
    else:
        activated = (wide * wide).mul_(wide).mul_(GELU_CUBE).add_(wide).mul_(GELU_SCALE)
        activated.tanh_().add_(1.0).mul_(wide).mul_(0.5)
    return activated.to(gate_up.dtype).mul_(up)
