"""Kernels compiled at run time, with a compiler and a driver that are played: no device, no cuda-core."""

import ctypes
import enum
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from loramux_server.kernels import nvrtc
from loramux_server.kernels.kernel_cache import KernelCache
from loramux_server.kernels.nvrtc import CudaKernel, KernelError, load_kernel, tensor_map_3d, unavailable_reason


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_INVALID_IMAGE = 200


class Cuda:
    """What the played compiler and driver do, and what was asked of them."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.shared: list[int] = []
        self.compile_error: Exception | None = None
        self.nvrtc_error: Exception | None = None
        self.driver_version = 13000
        self.nvrtc_version = (13, 0)
        self.status = Status.CUDA_SUCCESS
        self.packages = {"cuda-core": "1.2.2", "nvidia-cuda-nvrtc": "13.0.88"}

    def core(self) -> ModuleType:
        module: Any = ModuleType("cuda.core")

        class Program:
            def __init__(_, source: str, kind: str, *, options: Any) -> None:
                self.compiled.append((source, options.arch))

            def compile(_, target: str) -> Any:
                if self.compile_error is not None:
                    raise self.compile_error
                return SimpleNamespace(code=f"cubin {len(self.compiled)}".encode())

        module.Program = Program
        module.ProgramOptions = lambda *, arch, std: SimpleNamespace(arch=arch, std=std)
        return module

    def driver(self) -> SimpleNamespace:
        names = SimpleNamespace(
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
            CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6),
            CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace()),
            CUlaunchConfig=lambda: SimpleNamespace(attrs=[], numAttrs=0),
        )
        for kind in ("DataType.BFLOAT16", "Interleave.NONE", "Swizzle.128B", "L2promotion.L2_256B"):
            group, value = kind.split(".")
            word = {"DataType": "DATA_TYPE", "L2promotion": "L2_PROMOTION"}.get(group, group.upper())
            setattr(names, f"CUtensorMap{group}", SimpleNamespace(**{f"CU_TENSOR_MAP_{word}_{value}": value}))
        names.CUtensorMapFloatOOBfill = SimpleNamespace(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE="NONE")
        names.cuuint32_t = names.cuuint64_t = int
        names.cuDriverGetVersion = lambda: (Status.CUDA_SUCCESS, self.driver_version)
        names.cuLibraryLoadData = self._load
        names.cuLibraryGetKernel = lambda library, name: (Status.CUDA_SUCCESS, (library, name))
        names.cuKernelGetFunction = lambda kernel: (Status.CUDA_SUCCESS, kernel)
        names.cuFuncSetAttribute = self._set_shared
        names.cuLaunchKernelEx = self._launch
        names.cuTensorMapEncodeTiled = lambda *arguments: (self.status, arguments)
        return names

    def version(self) -> tuple[int, int, int]:
        if self.nvrtc_error is not None:
            raise self.nvrtc_error
        return (0, *self.nvrtc_version)

    def package(self, name: str) -> str:
        if name not in self.packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.packages[name]

    def _load(self, binary: bytes, *_: Any) -> tuple[Status, bytes]:
        good = binary.startswith(b"cubin")
        return (Status.CUDA_SUCCESS if good else Status.CUDA_ERROR_INVALID_IMAGE), binary

    def _set_shared(self, function: Any, attribute: int, value: int) -> tuple[Status]:
        self.shared.append(value)
        return (self.status,)

    def _launch(self, config: Any, function: Any, parameters: Any, extra: int) -> tuple[Status]:
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        threads = (config.blockDimX, config.blockDimY, config.blockDimZ)
        self.launched.append((grid, threads, config.sharedMemBytes, config.hStream, config.numAttrs, parameters))
        return (self.status,)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    played = Cuda()
    bindings: Any = ModuleType("cuda.bindings")
    bindings.driver, bindings.nvrtc = played.driver(), SimpleNamespace(nvrtcVersion=played.version)
    for name, module in {"cuda": ModuleType("cuda"), "cuda.core": played.core(), "cuda.bindings": bindings}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", played.package)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    nvrtc._versions.cache_clear()
    yield played
    nvrtc._versions.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nvrtc, "_cache", lambda: KernelCache(tmp_path))
    return tmp_path


def load(source: str = "source", arch: str = "sm_90a", *, shared_bytes: int = 0, overlap: bool = False) -> CudaKernel:
    nvrtc._versions.cache_clear()  # as in another process
    arguments = (None, ctypes.c_int)
    return load_kernel(source, "add", arch=arch, arguments=arguments, shared_bytes=shared_bytes, overlap=overlap)


def test_compiled_once_and_found_by_the_next_start(cuda: Cuda, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load()
        load()
    assert cuda.compiled == [("source", "sm_90a")] and len(list(folder.iterdir())) == 1
    assert caplog.text.count("compiled add for sm_90a in") == 1


@pytest.mark.parametrize(
    "change",
    ["source", "arch", "standard", "driver", "nvrtc", "cuda-core", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"],
)
def test_whatever_a_binary_depends_on_makes_another(
    change: str, cuda: Cuda, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    if change == "standard":
        monkeypatch.setattr(nvrtc, "_STANDARD", "c++20")
    elif change == "driver":
        cuda.driver_version = 13010
    elif change == "nvrtc":
        cuda.nvrtc_version = (13, 1)
    elif change not in ("source", "arch"):
        cuda.packages[change] = "99"
    load("other" if change == "source" else "source", "sm_100a" if change == "arch" else "sm_90a")
    assert len(cuda.compiled) == 2 and len(list(folder.iterdir())) == 2


def test_source_and_architecture_do_not_run_into_each_other(cuda: Cuda, folder: Path) -> None:
    load("ab", "c")
    load("a", "bc")
    assert len(cuda.compiled) == 2


def test_a_binary_that_the_driver_refuses_is_compiled_again_and_said(
    cuda: Cuda, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    [path] = folder.iterdir()
    KernelCache(folder).put(path.stem, b"whole, but of no use")
    load()
    assert KernelCache(folder).get(path.stem) == b"cubin 2"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    cause = "add does not load: CUDA_ERROR_INVALID_IMAGE"
    assert said == [f"{cause}; the kept binary is removed and compiled again"]


def test_a_refused_binary_is_gone_even_if_none_takes_its_place(cuda: Cuda, folder: Path) -> None:
    load()
    [path] = folder.iterdir()
    KernelCache(folder).put(path.stem, b"whole, but of no use")
    cuda.compile_error = ValueError("no")
    with pytest.raises(KernelError, match="does not compile"):
        load()
    assert not list(folder.iterdir())


def test_what_does_not_compile_says_why_and_is_not_kept(cuda: Cuda, folder: Path) -> None:
    cuda.compile_error = ValueError('(1): error: identifier "y" is undefined\n' + "x" * 10_000 + "\n\0")
    with pytest.raises(KernelError, match=r'^add does not compile for sm_90a: .*identifier "y"') as caught:
        load()
    assert len(str(caught.value)) <= 2000 and not list(folder.iterdir())
    cuda.compile_error = ValueError("short\n\0")
    with pytest.raises(KernelError) as caught:
        load()
    assert str(caught.value) == "add does not compile for sm_90a: short"


def test_no_compiler_is_a_kernel_error_in_a_line(cuda: Cuda, folder: Path) -> None:
    cuda.nvrtc_error = RuntimeError('Failure finding "libnvrtc.so.13"\n  listdir("/usr/lib"):\n    a\n    b')
    with pytest.raises(KernelError) as caught:
        load()
    assert str(caught.value) == 'NVRTC cannot be loaded: Failure finding "libnvrtc.so.13"'


def test_a_launch_has_what_it_was_asked_with(cuda: Cuda, folder: Path) -> None:
    load(shared_bytes=70_000).launch((3, 2, 1), 640, ["map", 7], stream=99)
    load(overlap=True).launch((1, 1, 1), 32, ["map", 8], stream=0)
    types = (None, ctypes.c_int)
    assert cuda.shared == [70_000, 0]
    assert cuda.launched == [
        ((3, 2, 1), (640, 1, 1), 70_000, 99, 0, (("map", 7), types)),
        ((1, 1, 1), (32, 1, 1), 0, 0, 1, (("map", 8), types)),
    ]


def test_what_the_driver_refuses_is_named(cuda: Cuda, folder: Path) -> None:
    kernel = load()
    cuda.status = Status.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(KernelError, match=r"^add does not launch: CUDA_ERROR_INVALID_VALUE$"):
        kernel.launch((1, 1, 1), 4096, ["map", 7], stream=0)
    with pytest.raises(KernelError, match=r"^add takes 999999 bytes of shared memory: CUDA_ERROR_INVALID_VALUE$"):
        load(shared_bytes=999_999)
    with pytest.raises(KernelError, match=r"^tensor map: CUDA_ERROR_INVALID_VALUE$"):
        tensor_map_3d(8, sizes=(64, 1, 1), strides=(128, 128), box=(64, 8, 2))


def test_a_tensor_map_has_its_sizes_and_strides_in_order(cuda: Cuda) -> None:
    described: Any = tensor_map_3d(4096, sizes=(64, 7, 56), strides=(7168, 128), box=(64, 8, 2))
    assert described[:7] == ("BFLOAT16", 3, 4096, [64, 7, 56], [7168, 128], [64, 8, 2], [1, 1, 1])


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings", "cuda", None])
def test_what_is_missing_is_named_with_what_to_install(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        if missing == "cuda":
            raise ModuleNotFoundError("No module named 'cuda'")  # what looking for a part of it does
        return None if name == missing else object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    reason = unavailable_reason()
    if missing is None:
        assert reason is None
    else:
        package = "cuda.core" if missing == "cuda" else missing
        assert reason is not None and reason.startswith(
            f"{package} is not installed: pip install 'loramux[server,cuda]'"
        )
