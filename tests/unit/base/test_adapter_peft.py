"""Parity with PEFT itself: which rank and which scale a module gets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from loramux_base.adapter import AdapterConfig, read_layout
from tests.support.adapters import TINY_CONFIG, tiny_base

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear", "r": 5, "lora_alpha": 7},
    "regex": {"target_modules": r".*\.mlp\.(up|down)_proj"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    "rank pattern": {"target_modules": "all-linear", "rank_pattern": {"layers.1.self_attn.q_proj": 8, "q_proj": 2}},
    # PEFT sorts the keys when it saves, so that the order at training is lost: what counts is the saved order.
    "sorted": {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 8}},
    "patterns": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"down_proj": 6, r"layers\.(0|2)\..*proj": 3, "up_proj": 9},
        "alpha_pattern": {"mlp.up_proj": 1.5, "^model.layers.1.mlp.*": 11},
    },
    "layers": {"target_modules": ["k_proj", "mlp.gate_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["self_attn.o_proj", "down_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_and_scales_equal_pefts(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    trained = get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY_CONFIG)), LoraConfig(**{"r": 4, **CASES[case]}))
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**TINY_CONFIG)), tmp_path)
    layout = read_layout(tmp_path, tiny_base(), max_rank=16)
    ours = {(part.layer, part.module): (part.rank, part.scale) for part in layout.modules}
    theirs = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in getattr(module, "lora_A", {}):
            words = name.split(".")
            theirs[int(words[words.index("layers") + 1]), words[-1]] = (module.r["default"], module.scaling["default"])
    assert ours == theirs
    assert ours


PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "1.self_attn.q_proj",
    "ayers.1.self_attn.q_proj",
    "proj",
    "q.proj",
    ".*",
    "",
    r".*\.q_proj",
    "^layers.1.*",
    "^model.*q_proj",
    r"model\.layers\.\d+\.self_attn\.[qk]_proj",
    "layers.1?1.self_attn.q_proj",
    "(q|k)_proj",
    "(?:self_attn|mlp).(?:q_proj|up_proj)",
    "layers.[0-9]{1,2}.self_attn.q_proj",
]


@pytest.mark.parametrize("reverse", [False, True])
def test_pattern_matching_equals_pefts(reverse: bool) -> None:
    paths = [
        f"{prefix}layers.{layer}.{rest}"
        for prefix in ("model.", "model.language_model.")
        for layer in (0, 1, 11)
        for rest in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    order = PATTERNS[::-1] if reverse else PATTERNS
    for skipped in range(len(order)):
        table = {pattern: number + 1 for number, pattern in enumerate(order[skipped:])}
        config = AdapterConfig.from_json(json.dumps({"peft_type": "LORA", "r": 99, "rank_pattern": table}).encode())
        for path in paths:
            assert config.rank_of(path) == table.get(get_pattern_key(table.keys(), path), 99), (path, table)
