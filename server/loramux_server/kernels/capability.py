"""Which kernel form can run here.

An operation takes its Triton form when its tensors live on CUDA, Triton can be imported and the shape is one that the
kernel was written for. Everything else takes the torch form; a fallback on CUDA is logged once for each cause.
"""

import functools
import importlib.util
import logging

import torch

_log = logging.getLogger(__name__)

_MIN_CAPABILITY = (8, 0)


@functools.cache
def triton_available() -> bool:
    """Tell whether the Triton forms can run on this process' CUDA device.

    Returns:
        True if Triton is installed and the current device has compute capability 8.0 or later (bfloat16 products).
    """
    if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= _MIN_CAPABILITY


def use_triton(tensor: torch.Tensor, operation: str, unsupported: str | None = None) -> bool:
    """Choose the form of one call.

    Args:
        tensor: Any operand; its device decides.
        operation: Name of the operation, for the log.
        unsupported: Why the Triton form cannot take this call, None if it can.

    Returns:
        True for the Triton form, False for the torch form.
    """
    if not tensor.is_cuda:
        return False
    if not triton_available():
        _log_fallback(operation, "Triton is not available")
        return False
    if unsupported is not None:
        _log_fallback(operation, unsupported)
        return False
    return True


@functools.cache
def _log_fallback(operation: str, cause: str) -> None:
    """Log a fallback to torch once for each operation and cause."""
    _log.warning("%s runs in torch: %s", operation, cause)


def row_multiple() -> int:
    """Row count multiple at which a CPU matrix product gives each row the same bits whatever the other rows.

    The CPU library splits the rows between threads and takes another kernel, with another summation order, for a
    remainder of one to three rows. Multiples of four rows a thread leave no such remainder.

    Returns:
        Rows to pad a product to a multiple of.
    """
    return max(8, 4 * torch.get_num_threads())


def pad_columns(matrix: torch.Tensor) -> torch.Tensor:
    """Pad the last dimension with zeros to a multiple of 16, the other half of `row_multiple`.

    Rows of another length are aligned differently from one another, and the CPU library's product depends on that.

    Args:
        matrix: Any tensor; usual widths come back as they are.

    Returns:
        The tensor itself or a padded copy.
    """
    missing = -matrix.shape[-1] % 16
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix
