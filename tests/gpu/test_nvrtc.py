"""Kernels compiled at run time: kept on disk, found by the next process, made anew when damaged, launched in graphs."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loramux_server.kernels import nvrtc
from loramux_server.kernels.kernel_cache import KernelCache
from loramux_server.kernels.nvrtc import CudaKernel, KernelError, load_kernel, unavailable_reason

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))

SOURCE = 'extern "C" __global__ void add(float* values, float by) { values[threadIdx.x] += by; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nvrtc, "_cache", lambda: KernelCache(tmp_path))
    return tmp_path


def load(source: str = SOURCE) -> CudaKernel:
    major, minor = torch.cuda.get_device_capability()
    return load_kernel(source, "add", arch=f"sm_{major}{minor}", arguments=(ctypes.c_void_p, ctypes.c_float))


def run(kernel: CudaKernel, values: torch.Tensor, by: float) -> None:
    kernel.launch((1, 1, 1), len(values), (values.data_ptr(), by), stream=torch.cuda.current_stream().cuda_stream)


def test_compiled_once_and_launched(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = torch.zeros(32, device="cuda")
    with caplog.at_level(logging.INFO):
        run(load(), values, 1.0)
        run(load(), values, 2.0)
    assert caplog.text.count("compiled add") == 1 and len(list(folder.iterdir())) == 1
    assert values.tolist() == [3.0] * 32


def test_a_binary_that_does_not_load_is_compiled_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load()
    [path] = folder.iterdir()
    KernelCache(folder).put(path.stem, b"whole, but no binary")
    values = torch.zeros(32, device="cuda")
    run(load(), values, 1.0)
    assert values.tolist() == [1.0] * 32 and "does not load" in caplog.text
    assert (KernelCache(folder).get(path.stem) or b"").startswith(b"\x7fELF")


def test_what_does_not_compile_says_why(folder: Path) -> None:
    with pytest.raises(KernelError, match=r'(?s)add does not compile for sm_\d+.*identifier "nothing"'):
        load(SOURCE.replace("by;", "nothing;"))
    assert not list(folder.iterdir())


def test_in_a_graph(folder: Path) -> None:
    kernel, values = load(), torch.zeros(32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(kernel, values, 1.0)
        run(kernel, values, 2.0)
    for _ in range(3):
        graph.replay()
    assert values.tolist() == [9.0] * 32


def test_a_refused_launch_is_an_error(folder: Path) -> None:
    with pytest.raises(KernelError, match="CUDA_ERROR_INVALID_VALUE"):
        run(load(), torch.zeros(4096, device="cuda"), 1.0)


def test_the_next_process_finds_it(tmp_path: Path) -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from tests.gpu.test_nvrtc import load, run\nimport torch\n"
        "values = torch.zeros(32, device='cuda'); run(load(), values, 1.0); print(values.sum().item())"
    )
    environment = {**os.environ, "LORAMUX_KERNEL_CACHE": str(tmp_path / "kernels")}
    said = [
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert ["compiled add" in one.stderr for one in said] == [True, False]
    assert [one.stdout.strip() for one in said] == ["32.0"] * 2
