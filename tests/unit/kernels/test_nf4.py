"""The packed order of NF4 bytes, its inverse, the torch form of the product, and what our kernel does not take."""

import pytest
import torch
from torch import Tensor

from loramux_base import nf4
from loramux_base.nf4 import Nf4Weight
from loramux_server.kernels import nf4_sm90
from loramux_server.kernels.nf4 import (
    BLOCK,
    BLOCK_BYTES,
    PackedNf4,
    nf4_dequantize,
    nf4_linear,
    nf4_linear_torch,
    pack,
    shape_unsupported,
    unpack,
    unsupported,
)
from loramux_server.kernels.nvrtc import KernelError

CPU = torch.device("cpu")
SHAPES = [(64, 64), (2, 64), (130, 192), (4098, 64), (4160, 128)]
"""Whole blocks, less than one, a last one that is not full, and more rows than are packed at once."""


def drawn(n: int, k: int, seed: int = 0) -> Nf4Weight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(n, k // 64, generator=generator) * 0.05 + 0.01
    return Nf4Weight(codes=codes, absmax=absmax, source_dtype=torch.bfloat16)


def code_of(weight: Nf4Weight, row: int, column: int) -> int:
    byte = int(weight.codes[row, column // 2])
    return byte & 15 if column % 2 else byte >> 4


def packed_code(packed: PackedNf4, row: int, column: int) -> int:
    """As the kernel's threads find it, told apart from how `pack` moves it there."""
    block = packed.blocks[row // 64, column // 64]
    row, column = row % 64, column % 64
    warp, g, of_pair = row // 16, row % 16 // 2, row % 2
    word, half, q = column // 16, column % 16 // 8, column % 8 // 2
    thread = warp * 32 + g * 4 + q
    byte = int(block[thread * 16 + word * 4 + half * 2 + of_pair])
    return byte >> 4 if column % 2 else byte & 15


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_unpack_is_the_inverse(n: int, k: int) -> None:
    weight = drawn(n, k)
    packed = pack(weight)
    back = unpack(packed)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.absmax, weight.absmax)
    assert back.codes.is_contiguous() and back.absmax.is_contiguous()
    assert packed.shape == weight.shape == back.shape


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_size_and_padding(n: int, k: int) -> None:
    packed = pack(drawn(n, k))
    rows = -(-n // 64)
    assert packed.blocks.shape == (rows, k // 64, BLOCK_BYTES) and packed.blocks.is_contiguous()
    assert packed.nbytes == rows * (k // 64) * (64 * 32 + 64 * 4)
    assert packed.arrivals.dtype == torch.int32 and not packed.arrivals.any()
    # A counter for each tile of 64 rows of W and each of the 8 of x, for tiles of up to 4 blocks.
    assert all(len(packed.arrivals) >= -(-rows // wide) * wide * 8 for wide in (1, 2, 4))
    whole = unpack(PackedNf4(blocks=packed.blocks, shape=(rows * 64, k), arrivals=packed.arrivals))
    assert not whole.codes[n:].any() and not whole.absmax[n:].any()


def test_the_order_is_that_of_the_kernels_threads() -> None:
    weight = drawn(130, 192)
    packed = pack(weight)
    places = [
        (0, 0),
        (0, 1),
        (1, 0),
        (2, 0),
        (0, 2),
        (0, 8),
        (0, 16),
        (16, 0),
        (63, 63),
        (64, 64),
        (77, 107),
        (129, 191),
    ]
    assert [packed_code(packed, *place) for place in places] == [code_of(weight, *place) for place in places]
    every = [(row, column) for row in range(64, 128) for column in range(64, 128)]
    assert [packed_code(packed, *place) for place in every] == [code_of(weight, *place) for place in every]


def test_the_maxima_follow_the_codes_of_their_block() -> None:
    weight = drawn(130, 192)
    packed = pack(weight)
    for row, block in [(0, 0), (1, 0), (63, 2), (64, 1), (129, 2)]:
        at = 64 * 32 + row % 64 * 4
        maximum = packed.blocks[row // 64, block, at : at + 4].clone().view(torch.float32)
        assert maximum.item() == weight.absmax[row, block].item()


def test_one_code_lies_where_the_docstring_says() -> None:
    codes = torch.zeros(64, 32, dtype=torch.uint8)
    codes[16 + 2 * 3 + 1, (16 * 2 + 8 + 2 * 1) // 2] = 0xAB  # warp 1, g 3, row 1 of the pair; word 2, half 1, q 1
    packed = pack(Nf4Weight(codes=codes, absmax=torch.zeros(64, 1), source_dtype=torch.bfloat16))
    [(_, _, place)] = packed.blocks.nonzero().tolist()
    assert place == (32 + 4 * 3 + 1) * 16 + 4 * 2 + 2 * 1 + 1
    assert int(packed.blocks[0, 0, place]) == 0xBA


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_torch_form(n: int, k: int, bias: bool) -> None:
    weight, added = drawn(n, k), torch.randn(n) if bias else None
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    out = nf4_linear_torch(x, pack(weight), added)
    dense = nf4.dequantize(weight, torch.float32)
    expected = x @ dense.T + (0 if added is None else added)
    # The levels are rounded to bfloat16, nothing else is.
    room = 2**-9 * (x.abs() @ dense.abs().T) + 1e-6
    assert out.shape == (3, n) and bool(((out - expected).abs() <= room).all())
    assert not torch.equal(out, expected)


def test_torch_form_gives_the_dtype_of_x() -> None:
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    bias = torch.randn(2, dtype=torch.bfloat16)
    packed = pack(drawn(2, 64))
    out = nf4_linear_torch(x, packed, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, nf4_linear_torch(x.float(), packed, bias.float()).to(torch.bfloat16))


def test_on_the_cpu_the_product_is_the_torch_form() -> None:
    x, packed = torch.randn(3, 192), pack(drawn(130, 192))
    assert torch.equal(nf4_linear(x, packed, None), nf4_linear_torch(x, packed, None))
    assert torch.equal(nf4_linear(x, packed, None, batch_invariant=True), nf4_linear_torch(x, packed, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantize_has_the_bits_of_the_checkpoint(n: int, k: int, dtype: torch.dtype) -> None:
    weight = drawn(n, k)
    assert torch.equal(nf4_dequantize(pack(weight), dtype), nf4.dequantize(weight, dtype))


def test_a_quantized_weight_survives_the_order() -> None:
    values: Tensor = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
    weight = nf4.quantize(values)
    dense = nf4_dequantize(pack(weight), torch.float32)
    # Levels are at most 0.304 apart, so a value is within half of that, of its block's maximum.
    assert bool(((dense - values).abs() <= 0.153 * weight.absmax.repeat_interleave(64, dim=1)).all())


def test_where_the_kernel_does_not_run() -> None:
    assert unsupported(CPU, torch.bfloat16) == "it needs a CUDA device"
    assert unsupported(torch.device("cuda", 0), torch.float16) == "it computes in bfloat16, not float16"


@pytest.mark.parametrize(("shape", "said"), [((3, 64), "N = 3 is odd"), ((4, 96), "K = 96 is no multiple of 64")])
def test_shapes_that_it_does_not_take(shape: tuple[int, int], said: str) -> None:
    assert said in str(shape_unsupported(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_it_takes(shape: tuple[int, int]) -> None:
    assert shape_unsupported(shape) is None


class TestOnHopper:
    """What of the kernel's host side can be told without its card."""

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(nf4_sm90, "unavailable_reason", lambda: None)
        monkeypatch.setattr(nf4_sm90, "_dequantize_kernel", lambda: None)

    def test_it_runs(self) -> None:
        assert nf4_sm90.unavailable.__wrapped__(torch.device("cuda", 0)) is None

    def test_it_does_not_run_on_another_card(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        assert "this device has 10.0" in str(nf4_sm90.unavailable.__wrapped__(torch.device("cuda", 0)))

    def test_a_kernel_that_does_not_compile_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> None:
            raise KernelError("nf4_dequantize does not compile")

        monkeypatch.setattr(nf4_sm90, "_dequantize_kernel", broken)
        said = nf4_sm90.unavailable.__wrapped__(torch.device("cuda", 0))
        assert said == "nf4_dequantize does not compile"

    @pytest.mark.parametrize(
        ("rows", "blocks_n"),
        [(rows, wide) for rows in (8, 16, 32, 48, 64) for wide in (1, 2, 4) if wide > 1 or rows <= 32],
    )
    def test_stages_fit_into_shared_memory(self, rows: int, blocks_n: int) -> None:
        stages = nf4_sm90._stages(rows, blocks_n)
        stage = 2 * (4 // blocks_n * rows * BLOCK * 2 + 4 * BLOCK_BYTES)
        assert stages >= 2 and 65536 + stages * (stage + 2 * 8) + 4 * 4 <= 227 * 1024
        assert stage % 1024 == 0 and rows * BLOCK * 2 % 1024 == 0  # swizzled boxes begin at multiples of 1 KiB

    def test_the_pair_table_has_both_levels_of_a_byte(self) -> None:
        halves = nf4_sm90._pairs(CPU).view(torch.bfloat16).view(256, 2)
        levels = torch.tensor(nf4.LEVELS).to(torch.bfloat16)
        assert all(halves[byte, 0] == levels[byte & 15] and halves[byte, 1] == levels[byte >> 4] for byte in range(256))
