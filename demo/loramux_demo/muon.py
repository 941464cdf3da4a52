"""Muon: momentum whose update of a matrix is orthogonalized, so that rare facts move the weights as frequent ones do.

Method: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). Written here because torch's
own always runs its iteration in bfloat16, which is slow on CPUs without instructions for it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices [..., N, K] with about the same singular vectors and singular values near 1 (quintic Newton-Schulz).

    Args:
        matrices: What to orthogonalize, each by itself.
        dtype: Of the iteration and the result; bfloat16 is enough for an optimizer.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
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
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._dtype = dtype
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        # Matrices of one shape go together: small products cost their launch more than their work.
        self._groups = [(group, torch.zeros_like(torch.stack(group))) for group in by_shape.values()]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update with the gradients in `.grad`; the root mean square of an update is about 0.2 `lr`, as AdamW's.

        Raises:
            ValueError: A parameter has no gradient.
        """
        for parameters, buffer in self._groups:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if len(gradients) < len(parameters):
                raise ValueError("a matrix has no gradient; give Muon only those that the loss depends on")
            gradient = torch.stack(gradients)
            buffer.lerp_(gradient, 1 - self._momentum)
            updates = orthogonalize(gradient.lerp(buffer, self._momentum), self._dtype)
            scale = -lr * 0.2 * max(gradient.shape[-2:]) ** 0.5
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - lr * self._weight_decay)
                parameter.add_(update, alpha=scale)
