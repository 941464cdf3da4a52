"""Logits against transformers: prefill in chunks and decode mixed in packed batches, float32, every family."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loramux_base.adapter import base_shapes
from loramux_base.checkpoint import Checkpoint
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.load import load_model
from loramux_server.model.packing import Chunk, PagedSequences
from loramux_server.model.reference import ReferenceLM
from loramux_server.model.slab import LoraSlab
from loramux_server.model.weights import CheckpointSource
from tests.support.tiny_models import ALL_LINEAR, FAMILIES, make_adapter, make_checkpoint

TOLERANCE = 1e-5
FLAGS_TOLERANCE = 2e-5  # transformers itself is up to 2.2e-5 off its own float64 logits with the widest of these
CPU = torch.device("cpu")
# the longest tiny window is 24, so both sequences leave it
SEQUENCES = [
    torch.randint(512, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (61, 37)
]
# (sequence, first, end): a prompt in two chunks, decode beside prefill in both orders, decode beside decode
STEPS = [
    [(0, 0, 30)],
    [(0, 30, 31), (1, 0, 17)],
    [(1, 17, 36), (0, 31, 60)],
    [(1, 36, 37), (0, 60, 61)],
]


def run_steps(forward: Callable[..., Tensor], cache: PagedSequences, slots: tuple[int, int] = (-1, -1)) -> list[Tensor]:
    """Logits of each sequence, `[tokens, vocabulary]`."""
    rows: list[list[Tensor]] = [[], []]
    for step in STEPS:
        chunks = [
            Chunk(sequence=number, start=first, token_ids=SEQUENCES[number][first:end], slot=slots[number])
            for number, first, end in step
        ]
        logits = forward(cache.pack(chunks), cache.kv)
        for chunk, part in zip(chunks, logits.split([len(chunk.token_ids) for chunk in chunks]), strict=True):
            rows[chunk.sequence].append(part)
    return [torch.cat(parts) for parts in rows]


def cache_for(model: CausalLM | ReferenceLM) -> PagedSequences:
    return PagedSequences(model.spec, sequences=2, length=64, dtype=torch.float32, device=CPU, page_size=4)


def fused(model: CausalLM, slab: LoraSlab | None = None) -> Callable[..., Tensor]:
    return lambda batch, kv: model.logits(model.forward(batch, kv, slab))


@torch.no_grad()
def expected(model: torch.nn.Module) -> list[Tensor]:
    return [model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES]


def transformers_model(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()


def worst(got: list[Tensor], wanted: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_equal_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(family), weights="fp32", device="cpu")
    wanted = expected(transformers_model(checkpoint(family)))
    assert wanted[0].std() > 0.5  # else the tolerance would say nothing
    assert worst(run_steps(fused(model), cache_for(model)), wanted) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_slow_path_equals_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint(family)
    spec = load_model(directory, weights="fp32", device="cpu").spec
    source = CheckpointSource(Checkpoint(directory), weights="fp32")
    model = ReferenceLM(spec, source, dtype=torch.float32, device=CPU)
    assert worst(run_steps(model.logits, cache_for(model)), expected(transformers_model(directory))) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("llama", {"tie_word_embeddings": True, "kv_heads": 4}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
        ("phi3", {"sliding_window": 12}),
        ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_flags(family: str, overrides: dict[str, object], tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "base", family, **overrides)  # type: ignore[arg-type]
    model = load_model(directory, weights="fp32", device="cpu")
    wanted = expected(transformers_model(directory))
    assert worst(run_steps(fused(model), cache_for(model)), wanted) <= FLAGS_TOLERANCE


def test_older_config_layout(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = make_checkpoint(
        tmp_path / "base", "llama", rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    )
    wanted = expected(transformers_model(directory))
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    config.update(rope_theta=5e4, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype=config.pop("dtype"))
    (directory / "config.json").write_text(json.dumps(config))
    model = load_model(directory, weights="fp32", device="cpu")
    assert worst(run_steps(fused(model), cache_for(model)), wanted) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_mixed_adapters_equal_peft(family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import PeftModel

    directory = checkpoint(family)
    adapters = [
        make_adapter(tmp_path / "a", directory, rank=4, alpha=8, seed=1, target_modules=ALL_LINEAR),
        make_adapter(
            tmp_path / "b", directory, rank=17, alpha=9, seed=2, use_rslora=True, target_modules=("v_proj", "down_proj")
        ),
    ]
    model = load_model(directory, weights="fp32", device="cpu")
    slab = LoraSlab(
        base_shapes(Checkpoint(directory).config),
        rank_units=4,
        max_slots=2,
        max_rank=32,
        dtype=torch.float32,
        device=CPU,
    )
    slab.load(0, 0, 1, adapters[0])
    slab.load(1, 1, 2, adapters[1])
    wanted = [
        expected(PeftModel.from_pretrained(transformers_model(directory), str(adapter)).eval()) for adapter in adapters
    ]
    base = expected(transformers_model(directory))
    assert worst(wanted[0], base) > 0.5
    for slots in ((0, 1), (1, 0), (-1, 1), (0, 0)):
        got = run_steps(fused(model, slab), cache_for(model), slots)
        for number, slot in enumerate(slots):
            want = base[number] if slot < 0 else wanted[slot][number]
            assert (got[number] - want).abs().max() <= 3 * TOLERANCE, (slots, number)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_invariant_rows_keep_their_bits(checkpoint: Callable[[str], Path], threads: int) -> None:
    model = load_model(checkpoint("qwen2"), weights="nf4", device="cpu", batch_invariant=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mixed = run_steps(fused(model), cache_for(model))
        for number, ids in enumerate(SEQUENCES):
            one_by_one = [[1] * len(ids)] if threads == 1 else []  # slow with threads on a busy machine
            for sizes in ([len(ids)], [5, len(ids) - 6, 1], *one_by_one):
                cache, alone, start = cache_for(model), [], 0
                for size in sizes:
                    chunk = Chunk(sequence=number, start=start, token_ids=ids[start : start + size])
                    alone.append(fused(model)(cache.pack([chunk]), cache.kv))
                    start += size
                assert torch.equal(torch.cat(alone), mixed[number]), sizes
    finally:
        torch.set_num_threads(before)


def test_only_wanted_rows_are_projected(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("qwen2"), weights="fp32", device="cpu")
    cache = cache_for(model)
    chunks = [Chunk(sequence=0, start=0, token_ids=SEQUENCES[0]), Chunk(sequence=1, start=0, token_ids=SEQUENCES[1])]
    every = model.logits(model.forward(cache.pack(chunks), cache.kv))
    last = model.logits(model.forward(cache.pack(chunks, all_rows=False), cache.kv))
    assert last.shape == (2, 512) and last.dtype == torch.float32
    torch.testing.assert_close(last, every[[len(SEQUENCES[0]) - 1, -1]], rtol=0, atol=TOLERANCE)
