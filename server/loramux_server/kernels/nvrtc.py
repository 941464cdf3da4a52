"""CUDA C++ kernels, compiled on the user's machine by NVRTC through cuda-core: no compiler has to be installed.

A binary depends on source, options, card architecture, and the versions of compiler and driver; it is compiled once and
kept by `kernel_cache`. Nothing of CUDA is imported before a kernel is asked for.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from loramux_server.kernels.kernel_cache import KernelCache, default_folder

_log = logging.getLogger(__name__)
_lock = threading.Lock()

_STANDARD = "c++17"
_LOG_CHARACTERS = 2000

TensorMap = Any
"""A `CUtensorMap` of cuda-bindings."""


class KernelError(RuntimeError):
    """A kernel that compiler or driver refused, or no compiler; the text names it and has what they said."""


def unavailable_reason() -> str | None:
    """Why no kernel can be compiled here, None if one can."""
    for package in ("cuda.core", "cuda.bindings"):
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{package} is not installed: pip install 'loramux[server,cuda]', or cuda-core for your CUDA"
    return None


class CudaKernel:
    """A kernel, loaded on the device that was current.

    Args:
        function: Its `CUfunction`.
        name: Of the kernel, for errors.
        arguments: ctypes of its parameters, None for a `TensorMap`.
        shared_bytes: Dynamic shared memory of a block of threads.
        overlap: Start it while the kernel in front ends; it waits by itself, with `griddepcontrol.wait`.
        keep: What has to live as long as the function.
    """

    def __init__(
        self, function: Any, name: str, arguments: Sequence[Any], *, shared_bytes: int, overlap: bool, keep: object
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._function = function
        self._name = name
        self._arguments = tuple(arguments)
        self._keep = keep
        self._config = driver.CUlaunchConfig()
        self._config.sharedMemBytes = shared_bytes
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs = [attribute]
            self._config.numAttrs = 1

    def launch(self, grid: tuple[int, int, int], threads: int, values: Sequence[Any], *, stream: int) -> None:
        """Put a launch on a stream.

        Args:
            grid: Blocks of threads along x, y and z.
            threads: Of a block.
            values: A parameter each; addresses as integers.
            stream: `torch.cuda.Stream.cuda_stream`.

        Raises:
            KernelError: The driver refused.
        """
        config = self._config
        with _lock:
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
            config.hStream = stream
            (error,) = self._driver.cuLaunchKernelEx(config, self._function, (tuple(values), self._arguments), 0)
        _check(f"{self._name} does not launch", error)


def load_kernel(
    source: str,
    name: str,
    *,
    arch: str,
    arguments: Sequence[Any],
    shared_bytes: int = 0,
    overlap: bool = False,
) -> CudaKernel:
    """Compile, or find in the cache, and load on the current device.

    Args:
        source: CUDA C++ without includes; the kernel is `extern "C"`.
        name: Of the kernel.
        arch: As `sm_90a`.
        arguments: As in `CudaKernel`.
        shared_bytes: As in `CudaKernel`.
        overlap: As in `CudaKernel`.

    Raises:
        KernelError: It does not compile or load.
    """
    torch.cuda.current_stream()  # makes the context, if nobody did
    key = _key(source, arch)
    cache = _cache()
    binary = cache.get(key)
    if binary is not None:
        try:
            return _loaded(binary, name, arguments, shared_bytes, overlap)
        except KernelError as error:
            _log.warning("%s; the kept binary is removed and compiled again", error)
            cache.remove(key)
    began = time.monotonic()
    _log.info("compiling %s for %s, once on this machine", name, arch)
    binary = _compile(source, name, arch)
    _log.info("compiled %s for %s in %.1f s", name, arch, time.monotonic() - began)
    kernel = _loaded(binary, name, arguments, shared_bytes, overlap)
    cache.put(key, binary)
    return kernel


def tensor_map_3d(address: int, *, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """Describe a bfloat16 tensor of three dimensions for bulk copies, its boxes swizzled by 128 bytes.

    What a box has outside the tensor is filled with zero.

    Args:
        address: Of the first element, a multiple of 16.
        sizes: Elements along each dimension, the contiguous one first.
        strides: Bytes from one index to the next in the second and third dimension, multiples of 16.
        box: Elements that one copy takes along each dimension; the first makes 128 bytes.

    Raises:
        KernelError: The driver refused.
    """
    from cuda.bindings import driver

    error, described = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        len(sizes),
        address,
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(size) for size in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    _check("tensor map", error)
    return described


@functools.cache
def _cache() -> KernelCache:
    return KernelCache(default_folder())


def _key(source: str, arch: str) -> str:
    parts = (source, arch, _STANDARD, *_versions())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of what a binary may depend on, but for its source."""
    from cuda.bindings import driver, nvrtc

    error, driver_version = driver.cuDriverGetVersion()
    _check("driver version", error)
    try:
        failed, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as missing:
        raise KernelError(f"NVRTC cannot be loaded: {str(missing).partition(chr(10))[0]}") from missing
    if int(failed):
        raise KernelError(f"NVRTC says no version: {failed.name}")
    # NVRTC itself tells no more than 13.0, and its updates emit other code.
    updates = (_installed("nvidia-cuda-nvrtc"), _installed("nvidia-cuda-nvrtc-cu12"))
    return _installed("cuda-core"), str(driver_version), f"{major}.{minor}", *updates


def _installed(package: str) -> str:
    """Version of a package, empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compile(source: str, name: str, arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    try:
        program = Program(source, "c++", options=ProgramOptions(arch=arch, std=_STANDARD))
        return bytes(program.compile("cubin").code)
    except Exception as error:  # noqa: BLE001 - cuda-core's own error classes are private
        raise KernelError(f"{name} does not compile for {arch}: {error}"[:_LOG_CHARACTERS].rstrip("\0\n ")) from error


def _loaded(binary: bytes, name: str, arguments: Sequence[Any], shared_bytes: int, overlap: bool) -> CudaKernel:
    from cuda.bindings import driver

    error, library = driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0)
    _check(f"{name} does not load", error)
    error, kernel = driver.cuLibraryGetKernel(library, name.encode())
    _check(f"{name} does not load", error)
    error, function = driver.cuKernelGetFunction(kernel)
    _check(f"{name} does not load", error)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuFuncSetAttribute(function, attribute, shared_bytes)
    _check(f"{name} takes {shared_bytes} bytes of shared memory", error)
    keep = (binary, library, kernel)
    return CudaKernel(function, name, arguments, shared_bytes=shared_bytes, overlap=overlap, keep=keep)


def _check(what: str, error: Any) -> None:
    if int(error):
        raise KernelError(f"{what}: {error.name}")
