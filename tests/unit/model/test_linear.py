"""One linear op, several backends: equal values, choice by table, bytes reported, rows independent of the batch."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_base import nf4
from loramux_server.kernels.capability import row_multiple
from loramux_server.kernels.nf4 import nf4_linear_torch, pack
from loramux_server.model import linear as linear_module
from loramux_server.model.linear import (
    Linear,
    TuningRow,
    TuningTable,
    _linear_in_blocks,
    linear_row_stable,
    packable,
)

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def linear(weight: Tensor | nf4.Nf4Weight, bias: Tensor | None = None, **options: object) -> Linear:
    return Linear(weight, bias, dtype=torch.float32, device=CPU, **options)  # type: ignore[arg-type]


def test_dense() -> None:
    weight, bias, x = drawn(96, 64), drawn(96, seed=1), drawn(5, 64, seed=2)
    layer = linear(weight, bias)
    assert torch.equal(layer(x), F.linear(x, weight, bias))
    assert layer.backend(5) == "dense" and layer.nbytes == 96 * 64 * 4 + 96 * 4
    assert (layer.out_features, layer.in_features) == (96, 64)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_shadow_and_dequantize_give_equal_bits(rows: int) -> None:
    quantized, bias, x = nf4.quantize(drawn(96, 128)), drawn(96, seed=1), drawn(rows, 128, seed=2)
    shadow, bytes_only = linear(quantized, bias, shadow=True), linear(quantized, bias)
    assert (shadow.backend(rows), bytes_only.backend(rows)) == ("dense", "dequantize")
    assert torch.equal(shadow(x), bytes_only(x))
    assert torch.equal(shadow(x), F.linear(x, nf4.dequantize(quantized, torch.float32), bias))
    assert bytes_only.nbytes == 96 * 128 // 2 + 96 * 128 // 64 * 4 + 96 * 4
    assert shadow.nbytes == 96 * 128 * 4 + 96 * 4


def test_bitsandbytes_backend_is_the_same_function() -> None:
    pytest.importorskip("bitsandbytes")
    quantized, bias, x = nf4.quantize(drawn(96, 128)), drawn(96, seed=1), drawn(5, 128, seed=2)
    table = TuningTable([TuningRow(n=96, k=128, max_m=8, backend="bitsandbytes")])
    layer = linear(quantized, bias, table=table)
    assert (layer.backend(8), layer.backend(9)) == ("bitsandbytes", "dequantize")
    torch.testing.assert_close(layer(x), linear(quantized, bias, shadow=True)(x), rtol=0, atol=1e-6)


def test_table_takes_the_smallest_row_that_holds() -> None:
    table = TuningTable(
        [
            TuningRow(n=8, k=64, max_m=64, backend="dequantize"),
            TuningRow(n=8, k=64, max_m=4, backend="bitsandbytes"),
            TuningRow(n=8, k=128, max_m=1000, backend="bitsandbytes"),
        ]
    )
    assert [table.choose(8, 64, m, CPU) for m in (1, 4, 5, 64, 65)] == [
        "bitsandbytes",
        "bitsandbytes",
        "dequantize",
        "dequantize",
        "dequantize",
    ]
    assert table.choose(8, 128, 900, CPU) == "bitsandbytes" and table.choose(9, 128, 900, CPU) == "dequantize"


def test_our_product_is_chosen_only_where_the_bytes_are_in_its_order() -> None:
    table = TuningTable(
        [
            TuningRow(n=8, k=64, max_m=100, backend="packed"),
            TuningRow(n=8, k=64, max_m=2**31 - 1, backend="dequantize"),
            TuningRow(n=8, k=128, max_m=4, backend="bitsandbytes"),
        ]
    )
    assert table.packs(8, 64) and table.packs(9, 9) and not table.packs(8, 128)
    chosen = [table.choose(8, 64, m, CPU, packed=packed) for packed in (True, False) for m in (1, 100, 101)]
    assert chosen == ["packed", "packed", "dequantize", "dequantize", "dequantize", "dequantize"]
    assert [table.choose(9, 9, m, CPU, packed=True) for m in (1, 256, 257)] == ["packed", "packed", "dequantize"]


def test_what_was_measured_for_our_order_says_nothing_of_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "bitsandbytes_available", lambda: True)
    cuda = torch.device("cuda")
    table = TuningTable(
        [
            TuningRow(n=8, k=64, max_m=4, backend="packed"),
            TuningRow(n=8, k=64, max_m=2**31 - 1, backend="dequantize"),
        ]
    )
    assert [table.choose(8, 64, m, cuda) for m in (1, 64, 65)] == ["bitsandbytes", "bitsandbytes", "dequantize"]
    assert [table.choose(8, 64, m, cuda, packed=True) for m in (4, 5)] == ["packed", "dequantize"]


def test_our_product_is_not_to_be_had_on_the_cpu() -> None:
    assert not packable((64, 64), torch.bfloat16, CPU)


def test_on_cuda_the_log_says_once_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear_module.packing, "unsupported", lambda device, dtype: "its package is not installed")
    linear_module._log_not_packed.cache_clear()
    with caplog.at_level(logging.INFO, logger=linear_module.__name__):
        packable((64, 64), torch.bfloat16, CPU)
        assert not caplog.messages
        assert not any(packable((64, 64), torch.bfloat16, torch.device("cuda")) for _ in range(3))
    assert caplog.messages == ["NF4 products go without the packed one: its package is not installed"]


def test_our_product_is_not_to_be_had_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module.packing, "unsupported", lambda device, dtype: None)
    shapes = [(64, 64), (63, 64), (64, 96)]
    assert [packable(shape, torch.bfloat16, CPU) for shape in shapes] == [True, False, False]


@pytest.fixture
def takes_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are packed here, too; the product of them is the torch form."""
    monkeypatch.setattr(linear_module, "packable", lambda shape, dtype, device: True)
    monkeypatch.setattr(linear_module.packing, "prepare", lambda shape, device: None)


@pytest.mark.usefixtures("takes_packed")
class TestPacked:
    def test_up_to_256_rows_are_our_product(self) -> None:
        quantized, bias, x = nf4.quantize(drawn(96, 128)), drawn(96, seed=1), drawn(300, 128, seed=2)
        layer, dense = linear(quantized, bias), linear(quantized, bias, shadow=True)
        assert [layer.backend(rows) for rows in (1, 256, 257)] == ["packed", "packed", "dequantize"]
        assert torch.equal(layer(x[:7]), nf4_linear_torch(x[:7], pack(quantized), bias))
        assert torch.equal(layer(x), dense(x))
        assert torch.equal(layer.dense_weight(), dense.dense_weight())

    def test_batch_invariant_products_are_ours_for_every_row_count(self) -> None:
        layer = linear(nf4.quantize(drawn(96, 128)), batch_invariant=True)
        assert {layer.backend(rows) for rows in (1, 256, 257, 5000)} == {"packed"}

    def test_its_bytes_are_of_whole_blocks(self) -> None:
        quantized = nf4.quantize(drawn(96, 128))
        assert linear(quantized).nbytes == 128 * 128 // 2 + 128 * 128 // 64 * 4
        assert linear(quantized, drawn(96)).nbytes == linear(quantized).nbytes + 96 * 4

    def test_a_table_with_the_fused_product_keeps_the_checkpoints_order(self) -> None:
        table = TuningTable([TuningRow(n=96, k=128, max_m=8, backend="bitsandbytes")])
        layer = linear(nf4.quantize(drawn(96, 128)), table=table)
        assert (layer.backend(8), layer.backend(9)) == ("bitsandbytes", "dequantize")
        assert layer.nbytes == 96 * 128 // 2 + 96 * 128 // 64 * 4

    def test_a_shadow_is_never_packed(self) -> None:
        assert linear(nf4.quantize(drawn(96, 128)), shadow=True).backend(1) == "dense"


def test_batch_invariant_choice_ignores_the_row_count() -> None:
    table = TuningTable([TuningRow(n=96, k=128, max_m=8, backend="bitsandbytes")])
    layer = linear(nf4.quantize(drawn(96, 128)), table=table, batch_invariant=True)
    assert {layer.backend(rows) for rows in (1, 8, 9, 600)} == {"dequantize"}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (512, 64), (1152, 896), (896, 4864)])
def test_rows_do_not_depend_on_the_batch(n: int, k: int, threads: int) -> None:
    weight, bias, x = drawn(n, k), drawn(n, seed=1), drawn(300, k, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert row_multiple() % (4 * threads) == 0
        alone = torch.cat([linear_row_stable(x[i : i + 1], weight, bias) for i in range(40)])
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 17, 24, 31, 33, 63, 65, 100, 129, 255, 300):
            assert torch.equal(linear_row_stable(x[:rows], weight, bias)[:40], alone[:rows]), rows
        torch.testing.assert_close(alone, F.linear(x[:40], weight, bias), rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_blocks_of_fixed_size(rows: int) -> None:
    weight, x = drawn(32, 64), drawn(40, 64, seed=2)
    whole = _linear_in_blocks(x, weight, None, 16)
    part = _linear_in_blocks(x[:rows], weight, None, 16)
    assert part.shape == (rows, 32) and torch.equal(part, whole[:rows])
    torch.testing.assert_close(whole, F.linear(x, weight), rtol=0, atol=1e-5)
