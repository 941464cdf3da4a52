"""Muon: momentum whose update of a matrix is orthogonalized, so that rare facts move the weights as frequent ones do.

Method: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Written here because torch's
own always runs its iteration in bfloat16, which is slow on CPUs without instructions for it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix [N, K] with about the same singular vectors and singular values near 1 (quintic Newton-Schulz).

    Args:
        matrix: What to orthogonalize.
        dtype: Of the iteration and the result; bfloat16 is enough for an optimizer.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if matrix.shape[0] > matrix.shape[1] else x
    return result


class Muon:
    """Nesterov momentum, orthogonalized, with decoupled weight decay.

    Args:
        parameters: Matrices; vectors, embeddings and output projections belong to another optimizer.
        momentum: Share of the old momentum.
        weight_decay: Times the learning rate, per step.
        dtype: Of the orthogonalization.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._parameters = list(parameters)
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._dtype = dtype
        self._buffers = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update with the gradients in `.grad`; the root mean square of an update is about 0.2 `lr`, as AdamW's."""
        for parameter, buffer in zip(self._parameters, self._buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.lerp_(parameter.grad, 1 - self._momentum)
            update = orthogonalize(parameter.grad.lerp(buffer, self._momentum), self._dtype)
            parameter.mul_(1 - lr * self._weight_decay)
            parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)
