from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loramux_base.adapter import LINEAR_GROUPS, AdapterFormatError
from loramux_server.kernels.batch import LoraGroup
from loramux_server.model.slab import LoraSlab
from tests.support.adapters import TINY_CONFIG, tensors_of, tiny_base, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

BASE = tiny_base()


def make_slab(*, units: int = 4, slots: int = 3, poison: bool = True, dtype: torch.dtype = torch.float32) -> LoraSlab:
    return LoraSlab(BASE, rank_units=units, max_slots=slots, max_rank=32, dtype=dtype, device="cpu", poison=poison)


def delta(group: LoraGroup, slot: int, x: Tensor) -> Tensor:
    """The product that `LoraGroup` documents, slice by slice."""
    first = int(group.first_rows[slot])
    outs, start = [], 0
    for index, end in enumerate(group.slice_ends):
        rank = int(group.ranks[slot, index])
        rows = slice(first, first + rank)
        outs.append(float(group.scales[slot, index]) * (x @ group.a[index, rows].T) @ group.b[rows, start:end])
        start = end
    return torch.cat(outs, dim=-1)


def peft_model(seed: int, **config: Any) -> Any:
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY_CONFIG)), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


CASES: dict[str, dict[str, Any]] = {
    "r4": {"r": 4, "target_modules": "all-linear"},
    "r8": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "r16": {"r": 16, "target_modules": "all-linear"},
    "odd": {"r": 17, "lora_alpha": 5, "target_modules": "all-linear"},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"layers.1.self_attn.q_proj": 18, "up_proj": 3},
        "alpha_pattern": {"k_proj": 1, "mlp.*": 13},
    },
    "layers": {"r": 4, "target_modules": ["o_proj", "gate_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("case", CASES)
def test_products_equal_pefts(tmp_path: Path, case: str) -> None:
    model = peft_model(1, **CASES[case])
    model.save_pretrained(tmp_path)
    slab = make_slab()
    slab.load(1, 1, 2, tmp_path)
    slab.check_integrity()
    for layer in range(BASE.num_layers):
        block = model.base_model.model.model.layers[layer]
        for name, modules in LINEAR_GROUPS.items():
            x = torch.randn(5, BASE.modules[modules[0]][0])
            wanted = []
            for module in modules:
                linear = getattr(block.self_attn if "attn" in _parent(module) else block.mlp, module)
                wanted.append(
                    x @ linear.get_delta_weight("default").T
                    if hasattr(linear, "lora_A")
                    else torch.zeros(5, BASE.modules[module][1])
                )
            group = slab.group(layer, name)
            torch.testing.assert_close(delta(group, 1, x), torch.cat(wanted, dim=-1), rtol=1e-5, atol=1e-5)
            assert torch.count_nonzero(delta(group, 0, x)) == 0


def _parent(module: str) -> str:
    return "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def test_neighbours_and_reuse(tmp_path: Path) -> None:
    slab = make_slab()
    one = write_adapter(tmp_path / "one", tensors_of(BASE, rank=4, value=1.0))
    two = write_adapter(tmp_path / "two", tensors_of(BASE, rank=20, value=2.0), r=20)
    slab.load(0, 0, 1, one)
    slab.load(2, 1, 2, two)
    slab.check_integrity()
    assert slab.resident_slots == {0, 2}
    group = slab.group(1, "qkv")
    view = group.a.data_ptr()
    assert group is slab.group(1, "qkv")
    assert group.first_rows.tolist() == [0, 0, 16]
    assert group.ranks.tolist() == [[4] * 3, [0] * 3, [20] * 3]
    assert group.slice_ends == (32, 48, 64)
    assert group.a[:, :4].eq(1).all() and group.a[:, 16:36].eq(2).all()
    slab.clear(2)
    slab.clear(1)
    slab.check_integrity()
    slab.load(1, 1, 1, one)
    assert group.ranks.tolist() == [[4] * 3, [4] * 3, [0] * 3]
    assert group.a[:, 20:].isnan().all() and group.b[20:].isnan().all()
    slab.load(1, 2, 2, two)
    slab.check_integrity()
    assert group.first_rows.tolist() == [0, 32, 0]
    assert group.a.data_ptr() == view


def test_rows_without_owner_are_zero_unless_poisoned(tmp_path: Path) -> None:
    slab = make_slab(poison=False)
    slab.load(0, 1, 1, write_adapter(tmp_path / "a", tensors_of(BASE, layers=[0], modules=["q_proj"])))
    group = slab.group(0, "qkv")
    assert torch.count_nonzero(group.a) == 4 * 32
    assert torch.count_nonzero(group.b) == 4 * 32
    assert torch.count_nonzero(slab.group(1, "qkv").ranks) == 0
    slab.clear(0)
    assert torch.count_nonzero(group.ranks) == 0
    slab.load(1, 1, 1, write_adapter(tmp_path / "b", tensors_of(BASE, layers=[1], modules=["down_proj"])))
    assert torch.count_nonzero(group.a) == 0


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    slab = make_slab(dtype=torch.float16)
    slab.load(0, 0, 1, write_adapter(tmp_path / "good", tensors_of(BASE)))
    before = [slab.group(0, "qkv").a.clone(), slab.group(0, "qkv").ranks.clone()]
    for label, tensors, reason in (
        ("overflow", tensors_of(BASE, value=1e6), "ADAPTER_NUMERICS"),
        ("nan", tensors_of(BASE, value=float("nan")), "ADAPTER_NUMERICS"),
        ("half", dict(list(tensors_of(BASE).items())[:-1]), "ADAPTER_INCOMPATIBLE"),
    ):
        with pytest.raises(AdapterFormatError) as caught:
            slab.load(0, 0, 1, write_adapter(tmp_path / label, tensors))
        assert caught.value.reason == reason
    with pytest.raises(AdapterFormatError, match="rank units"):
        slab.load(1, 1, 1, write_adapter(tmp_path / "big", tensors_of(BASE, rank=17), r=17))
    after = [slab.group(0, "qkv").a, slab.group(0, "qkv").ranks]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, equal_nan=True)
    slab.check_integrity()


def test_a_copy_that_fails_half_way_leaves_an_empty_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slab = make_slab()
    slab.load(0, 0, 1, write_adapter(tmp_path / "a", tensors_of(BASE)))
    kept = slab.group(0, "qkv").ranks[0].clone()

    def broken(*_: object) -> None:
        slab.group(0, "qkv").ranks[1] = 3
        raise RuntimeError("the device failed")

    with monkeypatch.context() as patched:
        patched.setattr(slab, "_fill_rest", broken)
        with pytest.raises(RuntimeError, match="the device failed"):
            slab.load(1, 1, 1, write_adapter(tmp_path / "b", tensors_of(BASE)))
    assert 1 not in slab.resident_slots
    assert torch.count_nonzero(slab.group(0, "qkv").ranks[1]) == 0
    assert torch.equal(slab.group(0, "qkv").ranks[0], kept)
    slab.check_integrity()
    slab.load(1, 1, 1, write_adapter(tmp_path / "c", tensors_of(BASE)))
    slab.check_integrity()


def test_overlap_is_our_bug(tmp_path: Path) -> None:
    slab = make_slab()
    adapter = write_adapter(tmp_path / "a", tensors_of(BASE))
    slab.load(0, 0, 2, adapter)
    with pytest.raises(AssertionError, match="overlap"):
        slab.load(1, 1, 1, adapter)
    with pytest.raises(AssertionError, match="outside"):
        slab.load(1, 3, 2, adapter)
    slab.check_integrity()


def test_check_integrity_sees_a_wrong_table(tmp_path: Path) -> None:
    slab = make_slab()
    slab.load(0, 0, 1, write_adapter(tmp_path / "a", tensors_of(BASE)))
    slab.group(2, "down").ranks[1, 0] = 4
    with pytest.raises(AssertionError, match="layer 2, down_proj, slot 1"):
        slab.check_integrity()


def test_nbytes_counts_rows_and_tables() -> None:
    slab = make_slab(units=2, slots=3, dtype=torch.bfloat16)
    rows, layers = 32, 3
    widths = {"qkv": (3, 32, 64), "o": (1, 32, 32), "gate_up": (2, 32, 96), "down": (1, 48, 32)}
    numbers = sum(slices * rows * k + rows * n for slices, k, n in widths.values())
    tables = sum(slices * 3 * 8 for slices, _, _ in widths.values())
    assert slab.nbytes == layers * (2 * numbers + tables) + 3 * 4
