"""Which kernel form can run here.

An operation takes its Triton form when its tensors live on CUDA, Triton can be imported and the shape is one that the
kernel was written for. Everything else takes the torch form; a fallback on CUDA is logged once for each cause.

The torch forms of `paged_attention` and `lora_add` read the batch on the host, so a CUDA graph cannot hold them; those
of norm, rotary embedding and activation can be captured like any other launch.
"""

import functools
import importlib.util
import logging
import os

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


@functools.cache
def launches_overlap() -> bool:
    """Tell whether a kernel may be launched before the one in front of it is over (programmatic dependent launch).

    Returns:
        True on compute capability 9.0 and later, unless the variable `LORAMUX_KERNEL_OVERLAP` is 0: a profile by kernel
        wants that, since a kernel that waits for the one in front would count its wait.
    """
    if os.environ.get("LORAMUX_KERNEL_OVERLAP") == "0" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


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
    cause = _cause(unsupported)
    if cause is not None:
        _log_fallback(operation, cause)
    return cause is None


def capture_obstacle(device: torch.device, operation: str, unsupported: str | None) -> str | None:
    """Say why a CUDA graph cannot hold an operation whose torch form reads the batch on the host.

    Args:
        device: Where the operation runs.
        operation: Its name.
        unsupported: Why its Triton form cannot take this model's shape, None if it can.

    Returns:
        A clause for the log; None if nothing is in the way, and on any device but CUDA.
    """
    if device.type != "cuda":
        return None
    cause = _cause(unsupported)
    return None if cause is None else f"{operation} runs in torch and waits for the device ({cause})"


def _cause(unsupported: str | None) -> str | None:
    """Why a call on CUDA takes the torch form, None if it takes the Triton form."""
    if not triton_available():
        return "there is no Triton, or the device has a compute capability under 8.0"
    return unsupported


@functools.cache
def _log_fallback(operation: str, cause: str) -> None:
    """Log a fallback to torch once for each operation and cause."""
    _log.warning("%s runs in its torch form, several times slower: %s", operation, cause)


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
