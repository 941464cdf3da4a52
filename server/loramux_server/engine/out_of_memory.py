"""Tells running out of memory from every other failure of a launch."""

import torch

# What is said, apart from `torch.OutOfMemoryError`: by the CUDA runtime (pinned buffers, graph launches) and Triton
# (kernels that are loaded late), by cuBLAS (a handle or workspace), and by the allocator of the CPU. A broken context
# keeps cuBLAS from making a handle too: the runner's wait for the device, which follows, tells.
_PHRASES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "can't allocate memory",
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no room, after which both still work and a smaller step may fit.

    Args:
        error: What a launch raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)
