"""The packed NF4 product against float64, over the shapes of published models."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight
from loramux_server.kernels.nf4 import (
    PackedNf4,
    nf4_dequantize,
    nf4_linear,
    nf4_linear_torch,
    pack,
    unpack,
    unsupported,
)
from loramux_server.kernels.norm import rms_norm
from loramux_server.kernels.nvrtc import unavailable_reason
from loramux_server.model.linear import Linear

CUDA = torch.device("cuda")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or unavailable_reason() is not None,
    reason="the kernel needs compute capability 9.0 and cuda-core",
)

# (N, K) of fused q|k|v, o, gate|up, down.
SHAPES = {
    "qwen2.5-0.5b": [(1152, 896), (896, 896), (9728, 896), (896, 4864)],
    "qwen2.5-1.5b": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
    "qwen2.5-3b": [(2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008)],
    "qwen2.5-7b": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
    "qwen2.5-14b": [(7168, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    "qwen2.5-72b": [(10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568)],
    "llama-3-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "llama-3-70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "mistral-7b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "gemma-3-4b": [(4096, 2560), (2560, 2048), (20480, 2560), (2560, 10240)],
    "gemma-3-12b": [(8192, 3840), (3840, 4096), (30720, 3840), (3840, 15360)],
}
ROWS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 48, 49, 63, 64, 65, 100, 128, 200, 512)


def random_weight(n: int, k: int, seed: int, maxima: str = "random") -> Nf4Weight:
    generator = torch.Generator(CUDA).manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8, device=CUDA)
    absmax = torch.rand(n, k // 64, generator=generator, device=CUDA) * 0.05
    if maxima == "zero":
        absmax[::2] = 0.0
    elif maxima == "tiny":
        absmax *= 1e-30
    elif maxima == "huge":
        absmax *= 1e20
    elif maxima == "mixed":
        absmax *= 10.0 ** torch.randint(-6, 4, absmax.shape, generator=generator, device=CUDA)
    return Nf4Weight(codes=codes, absmax=absmax, source_dtype=torch.bfloat16)


def exact(weight: Nf4Weight) -> Tensor:
    """`[N, K]` float64: bfloat16 level x maximum, the function that the kernel computes."""
    levels = nf4.levels(CUDA).to(torch.bfloat16).double()
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).view(weight.shape)
    return levels[codes.long()] * weight.absmax.double().repeat_interleave(64, dim=1)


def assert_close(out: Tensor, x: Tensor, values: Tensor, bias: Tensor | None) -> None:
    """Within bfloat16's rounding of the result, and float32's of the sums."""
    expected = x.double() @ values.T
    room = x.double().abs() @ values.abs().T
    if bias is not None:
        expected, room = expected + bias.double(), room + bias.double().abs()
    assert bool(torch.isfinite(out).all())
    worst = ((out.double() - expected).abs() - 2**-8 * expected.abs() - 2e-6 * room).max().item()
    assert worst <= 0, f"{worst} over the bound"


def run(x: Tensor, weight: PackedNf4, bias: Tensor | None = None, *, batch_invariant: bool = False) -> Tensor:
    torch.empty(len(x), weight.shape[0], dtype=torch.bfloat16, device=CUDA).fill_(math.nan)  # what `out` gets hold of
    return nf4_linear(x, weight, bias, batch_invariant=batch_invariant)


def test_it_compiles() -> None:
    assert unsupported(CUDA, torch.bfloat16) is None


@pytest.mark.parametrize("model", SHAPES)
def test_shapes_of_models(model: str) -> None:
    for index, (n, k) in enumerate(SHAPES[model]):
        weight = random_weight(n, k, seed=index)
        values, packed = exact(weight), pack(weight)
        bias = torch.randn(n, dtype=torch.bfloat16, device=CUDA) if index == 0 else None
        for rows in ROWS:
            x = torch.randn(rows, k, dtype=torch.bfloat16, device=CUDA)
            assert_close(run(x, packed, bias), x, values, bias)
        assert int(packed.arrivals.abs().sum()) == 0
        del values


@pytest.mark.parametrize("maxima", ["zero", "tiny", "huge", "mixed"])
@pytest.mark.parametrize("rows", [1, 40, 64, 130])
def test_hostile_maxima(maxima: str, rows: int) -> None:
    weight = random_weight(3584, 3584, seed=3, maxima=maxima)
    x = torch.randn(rows, 3584, dtype=torch.bfloat16, device=CUDA)
    assert_close(run(x, pack(weight)), x, exact(weight), None)


@pytest.mark.parametrize(("n", "k"), [(2, 64), (64, 64), (66, 128), (130, 192), (1000, 448), (4098, 64)])
def test_small_and_ragged(n: int, k: int) -> None:
    weight = random_weight(n, k, seed=n)
    for rows in (1, 5, 64, 70):
        x = torch.randn(rows, k, dtype=torch.bfloat16, device=CUDA)
        assert_close(run(x, pack(weight)), x, exact(weight), None)


def test_equals_the_torch_form() -> None:
    weight = pack(random_weight(896, 896, seed=1))
    x = torch.randn(33, 896, dtype=torch.bfloat16, device=CUDA)
    torch.testing.assert_close(run(x, weight), nf4_linear_torch(x, weight, None), rtol=2**-7, atol=1e-3)


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight = pack(random_weight(3584, 3584, seed=5))
    x = torch.randn(64, 3584, dtype=torch.bfloat16, device=CUDA)
    clean = run(x, weight)
    x[7] = math.nan
    x[9, 100] = math.inf
    dirty = run(x, weight)
    assert not bool(torch.isfinite(dirty[7]).any()) and not bool(torch.isfinite(dirty[9]).all())
    others = [row for row in range(64) if row not in (7, 9)]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize(("n", "k"), [(37888, 3584), (3584, 18944), (4608, 3584), (896, 896)])
def test_batch_invariant(n: int, k: int) -> None:
    weight = pack(random_weight(n, k, seed=2))
    x = torch.randn(300, k, dtype=torch.bfloat16, device=CUDA)
    whole = run(x, weight, batch_invariant=True)
    for first, rows in [(0, 1), (5, 3), (63, 64), (100, 65), (299, 1), (11, 200)]:
        part = run(x[first : first + rows].contiguous(), weight, batch_invariant=True)
        assert torch.equal(part, whole[first : first + rows])


def test_same_bits_every_time() -> None:
    weight = pack(random_weight(3584, 18944, seed=4))
    x = torch.randn(64, 18944, dtype=torch.bfloat16, device=CUDA)
    first = run(x, weight)
    assert all(torch.equal(run(x, weight), first) for _ in range(50))


def test_graph_replays_with_other_values() -> None:
    weights = [pack(random_weight(4608, 3584, seed=seed)) for seed in range(4)]
    x = torch.randn(40, 3584, dtype=torch.bfloat16, device=CUDA)
    for weight in weights:
        run(x, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [nf4_linear(x, weight, None) for weight in weights]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for weight, out in zip(weights, outs, strict=True):
            assert torch.equal(out, run(x, weight))


def test_behind_the_kernel_that_writes_x() -> None:
    """It starts before that kernel is over, and must not read x before."""
    weight = pack(random_weight(37888, 3584, seed=6))
    sources = [torch.randn(64, 3584, device=CUDA) for _ in range(20)]
    expected = [run(source.to(torch.bfloat16), weight) for source in sources]
    x = torch.empty(64, 3584, dtype=torch.bfloat16, device=CUDA)
    outs = []
    for source in sources:
        x.copy_(source * 2 / 2)
        outs.append(nf4_linear(x, weight, None))
        x.fill_(math.nan)
    assert all(torch.equal(out, want) for out, want in zip(outs, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 64])
def test_chain_of_kernels_that_begin_before_the_one_in_front_is_over(rows: int) -> None:
    """Each reads what the one in front writes, into memory that one further in front may have read just now."""
    up, down = pack(random_weight(8192, 3584, seed=10)), pack(random_weight(3584, 8192, seed=11))
    x = torch.randn(rows, 3584, dtype=torch.bfloat16, device=CUDA)
    ones = torch.ones(3584, dtype=torch.bfloat16, device=CUDA)

    def chain(after_each: Callable[[], None]) -> Tensor:
        hidden = x
        for _ in range(20):
            wide = nf4_linear(hidden, up, None)
            after_each()
            narrow = nf4_linear(wide, down, None)
            after_each()
            hidden = rms_norm(narrow, ones, 1e-6)
            after_each()
        return hidden

    expected = chain(torch.cuda.synchronize)
    assert bool(torch.isfinite(expected).all())
    assert all(torch.equal(chain(lambda: None), expected) for _ in range(10))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for _ in range(10):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_more_rows_than_one_launch_takes() -> None:
    weight = pack(random_weight(3584, 3584, seed=12))
    x = torch.randn(1100, 3584, dtype=torch.bfloat16, device=CUDA)
    whole = run(x, weight)
    parts = [run(x[first : first + 512], weight) for first in (0, 512, 1024)]
    assert torch.equal(whole, torch.cat(parts))
    assert run(x[:0], weight).shape == (0, 3584)


def test_memory_that_is_used_again_with_another_shape() -> None:
    memory = torch.randn(64 * 1792, dtype=torch.bfloat16, device=CUDA)
    for rows, k in [(64, 1792), (128, 896), (32, 3584), (64, 896), (64, 1792)]:
        x, weight = memory[: rows * k].view(rows, k), random_weight(896, k, seed=k)
        assert_close(run(x, pack(weight)), x, exact(weight), None)


def test_layer_takes_it_where_it_can() -> None:
    weight, bias = random_weight(1152, 896, seed=13), torch.randn(1152, device=CUDA)
    x = torch.randn(300, 896, dtype=torch.bfloat16, device=CUDA)
    layer = Linear(weight, bias, dtype=torch.bfloat16, device=CUDA)
    assert [layer.backend(rows) for rows in (1, 256, 257)] == ["packed", "packed", "dequantize"]
    assert torch.equal(layer.dense_weight(), nf4.dequantize(weight, torch.bfloat16))
    assert_close(layer(x[:40]), x[:40], exact(weight), bias.to(torch.bfloat16))
    torch.testing.assert_close(layer(x)[:40], layer(x[:40]), rtol=2**-6, atol=2**-6)
    same = Linear(weight, bias, dtype=torch.bfloat16, device=CUDA, batch_invariant=True)
    assert same.backend(300) == "packed" and torch.equal(same(x)[7:9], same(x[7:9].clone()))
    half = Linear(weight, bias, dtype=torch.float16, device=CUDA)
    assert half.backend(1) != "packed" and bool(torch.isfinite(half(x[:4].half())).all())


def test_two_streams_at_once() -> None:
    weights = [pack(random_weight(37888, 3584, seed=8)), pack(random_weight(3584, 18944, seed=9))]
    inputs = [torch.randn(64, weight.shape[1], dtype=torch.bfloat16, device=CUDA) for weight in weights]
    expected = [run(x, weight) for x, weight in zip(inputs, weights, strict=True)]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[index].append(nf4_linear(inputs[index], weights[index], None))
    torch.cuda.synchronize()
    for index, want in enumerate(expected):
        assert all(torch.equal(out, want) for out in outs[index])


@pytest.mark.parametrize(("n", "k"), [(130, 192), (3584, 3584), (9728, 896)])
def test_dequantize_has_the_bits_of_the_checkpoint(n: int, k: int) -> None:
    weight = random_weight(n, k, seed=n, maxima="mixed")
    assert torch.equal(nf4_dequantize(pack(weight), torch.bfloat16), nf4.dequantize(weight, torch.bfloat16))


def test_unpack_is_the_inverse() -> None:
    weight = random_weight(4100, 448, seed=1)
    back = unpack(pack(weight))
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.absmax, weight.absmax)


def test_no_host_sync() -> None:
    weight = pack(random_weight(896, 896, seed=1))
    x = torch.randn(33, 896, dtype=torch.bfloat16, device=CUDA)
    run(x, weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        nf4_linear(x, weight, None)
        nf4_dequantize(weight, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
