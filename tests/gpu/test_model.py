"""The model on CUDA: self-test of every family, NF4 products of all backends, bytes resident, row independence."""

from pathlib import Path

import pytest
import torch

from loramux_base import nf4
from loramux_base.checkpoint import Checkpoint
from loramux_server.model.linear import Linear, TuningRow, TuningTable, bitsandbytes_available, dequantize
from loramux_server.model.load import load_model
from loramux_server.model.packing import Chunk, PagedSequences
from loramux_server.model.self_test import self_test
from loramux_server.model.spec import ModelSpec
from loramux_server.model.tuning import read_tuning, tuning_path
from loramux_server.tune_command import tune
from tests.support.tiny_models import FAMILIES, make_checkpoint, make_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_self_test(family: str, dtype: torch.dtype) -> None:
    spec = ModelSpec.from_config(make_config(family, hidden=256, heads=4, kv_heads=2).to_diff_dict())
    self_test(spec, device=CUDA, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_bits_equal_torch(dtype: torch.dtype) -> None:
    weight = nf4.quantize(torch.randn(512, 896, device=CUDA))
    assert torch.equal(dequantize(weight, dtype), nf4.dequantize(weight, dtype))


def test_quantizing_on_the_device_gives_the_bytes_of_the_cpu() -> None:
    source = torch.randn(512, 896)
    here, there = nf4.quantize(source), nf4.quantize(source.to(CUDA))
    assert torch.equal(here.codes, there.codes.cpu()) and torch.equal(here.absmax, there.absmax.cpu())


@pytest.mark.skipif(not torch.cuda.is_available() or not bitsandbytes_available(), reason="needs bitsandbytes")
@pytest.mark.parametrize("rows", [1, 3, 8, 33, 64, 200])
@pytest.mark.parametrize(("n", "k"), [(4608, 3584), (3584, 18944), (192, 64)])
def test_backends_compute_the_same_product(n: int, k: int, rows: int) -> None:
    weight = nf4.quantize(torch.randn(n, k) * k**-0.5)
    bias, x = torch.randn(n), torch.randn(rows, k, device=CUDA, dtype=torch.bfloat16)
    exact = x.double() @ nf4.dequantize(weight, torch.float32).to(CUDA).double().T + bias.to(CUDA).double()
    for backend in ("bitsandbytes", "dequantize"):
        table = TuningTable([TuningRow(n=n, k=k, max_m=1 << 20, backend=backend)])  # type: ignore[arg-type]
        layer = Linear(weight, bias, dtype=torch.bfloat16, device=CUDA, table=table)
        assert layer.backend(rows) == backend
        error = (layer(x).double() - exact).square().mean().sqrt() / exact.std()
        assert error < 6e-3, (backend, error)


@pytest.mark.parametrize("shadow", [False, True])
def test_nf4_model(tmp_path: Path, shadow: bool) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2", hidden=256, dtype="bfloat16")
    reference = load_model(base, weights="nf4", device="cpu")
    model = load_model(base, weights="nf4", device="cuda", shadow=shadow)
    assert model.dtype == torch.bfloat16 and Checkpoint(base).config["model_type"] == "qwen2"
    assert (model.linear_weight_bytes < 0.4 * reference.linear_weight_bytes) == (not shadow)
    ids = torch.randint(512, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = []
    for each in (reference, model):
        cache = PagedSequences(each.spec, sequences=1, length=40, dtype=each.dtype, device=each.device)
        parts = [(0, 30), (30, 39), (39, 40)]
        rows = [
            each.logits(each.forward(cache.pack([Chunk(sequence=0, start=a, token_ids=ids[a:b])]), cache.kv)).cpu()
            for a, b in parts
        ]
        logits.append(torch.cat(rows))
    assert (logits[0] - logits[1]).square().mean().sqrt() < 0.05 * logits[0].std()


def test_rows_do_not_depend_on_the_batch() -> None:
    weight, x = torch.randn(1152, 896) * 0.03, torch.randn(300, 896, device=CUDA, dtype=torch.bfloat16)
    layer = Linear(weight, None, dtype=torch.bfloat16, device=CUDA, batch_invariant=True)
    whole = layer(x)
    for rows in (1, 7, 64, 65, 130):
        assert torch.equal(layer(x[:rows]), whole[:rows])


def test_a_tuned_card_serves_by_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = make_checkpoint(tmp_path / "m", hidden=256, layers=1, dtype="bfloat16")
    assert load_model(directory, weights="nf4", device="cuda").details["tuned"] is False
    text = tune(directory)
    card = torch.cuda.get_device_name()
    assert str(tuning_path(card)) in text and "dequantize" in text
    assert {row.n for row in read_tuning(tuning_path(card)).rows}
    model = load_model(directory, weights="nf4", device="cuda")
    assert model.details["tuned"] is True
