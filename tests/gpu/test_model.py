"""The model on CUDA: self-test of every family, NF4 products of all backends, bytes resident, row independence."""

import gc
from pathlib import Path

import pytest
import torch

from loramux_base import nf4
from loramux_base.checkpoint import Checkpoint
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.engine import Engine
from loramux_server.engine.footprint import Footprint, memory_table
from loramux_server.engine.runner import build_runner
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
    path = tuning_path(torch.cuda.get_device_name())
    assert f"nothing written, as asked; {path}" in tune(directory, dry_run=True) and not path.exists()
    text = tune(directory)
    assert f"wrote {path}" in text and "dequantize" in text and text.count("-> chosen") == 1
    table = read_tuning(path)
    assert table is not None and table.torch == torch.__version__
    model = load_model(directory, weights="nf4", device="cuda")
    assert model.details["tuned"] is True
    assert model.details["tuned_prefill_chunk"] == table.chunk(model.spec)
    config = EngineConfig(
        model=str(directory), device="cuda", kv_pages=64, max_running=4, max_batch_tokens=64, self_test=False
    )
    runner = build_runner(config)
    try:
        limits = Engine.serving(config, runner, runner.ready).limits
        assert limits.prefill_chunk == min(64, table.chunk(model.spec) or 0)
    finally:
        runner.close()
    invariant = load_model(directory, weights="nf4", device="cuda", batch_invariant=True)
    assert "tuned_prefill_chunk" not in invariant.details


def test_memory_at_start_stands_beside_its_prediction(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", hidden=256, layers=2, dtype="bfloat16")
    config = EngineConfig(
        model=str(directory), device="cuda", kv_pages=256, max_running=4, max_batch_tokens=128, max_slots=4
    )
    gc.collect()  # nothing of another test may go while this one measures
    runner = build_runner(config)
    details = runner.ready.details
    runner.close()
    planned, actual = Footprint.read(details, "planned"), Footprint.read(details, "actual")
    assert planned is not None and actual is not None
    # The allocator may give a tensor of megabytes two more than it asks for.
    for name in ("weight_bytes", "adapter_bytes", "kv_bytes"):
        assert -(2**20) < getattr(actual, name) - getattr(planned, name) < 24 * 2**20, name
    assert actual.kv_pages == planned.kv_pages == 256
    assert actual.step_bytes is not None and actual.step_bytes > 0
    assert int(details["actual.device_bytes"]) > actual.weight_bytes + actual.adapter_bytes + actual.kv_bytes
    assert "the device reports" in memory_table(details)
