"""Device operations of the forward pass: one module an operation, a torch form and a Triton form of each."""

from loramux_server.kernels.capability import triton_available

__all__ = ["triton_available"]
