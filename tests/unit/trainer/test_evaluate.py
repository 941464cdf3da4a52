import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loramux_trainer.assess import assess
from loramux_trainer.base import choose_numerics, load_model, open_base
from loramux_trainer.config import LoraConfig
from loramux_trainer.data.codec import IGNORED, Sequence
from loramux_trainer.errors import ConfigError, DataError
from loramux_trainer.evaluate import Evaluation, evaluate
from loramux_trainer.export import export_adapter
from loramux_trainer.lora import add_lora


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[PeftModel]:
    wrapped = add_lora(load_model(open_base(base), choose_numerics("cpu")), LoraConfig(r=4), seed=1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    yield wrapped


@pytest.fixture(scope="module")
def sequences() -> tuple[Sequence, ...]:
    generator = random.Random(3)
    result = []
    for index in range(17):
        ids = generator.choices(range(3, 500), k=generator.randrange(4, 40))
        start = generator.randrange(1, len(ids))
        labels = [IGNORED] * start + ids[start:]
        result.append(Sequence(input_ids=tuple(ids), labels=tuple(labels), conversation=index // 2, place=f"a:{index}"))
    return tuple(result)


def _run(model: PeftModel, sequences: tuple[Sequence, ...], batch_size: int) -> Evaluation:
    return evaluate(model, sequences, pad_id=0, batch_size=batch_size, device=torch.device("cpu"))


def test_it_does_not_depend_on_the_batch_size_and_equals_sums_by_hand(
    model: PeftModel, sequences: tuple[Sequence, ...]
) -> None:
    nll, correct, tokens = 0.0, 0, 0
    with torch.no_grad():
        model.eval()
        for sequence in sequences:
            logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].double()
            for position, label in enumerate(sequence.labels):
                if label != IGNORED:
                    row = torch.log_softmax(logits[position - 1], dim=-1)
                    nll -= float(row[label])
                    correct += int(row.argmax() == label)
                    tokens += 1
    for batch_size in (1, 2, 4, 8, 17):
        result = _run(model, sequences, batch_size)
        assert (result.total.tokens, result.total.correct) == (tokens, correct)
        assert result.total.nll == pytest.approx(nll, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert len(result.by_conversation) == 9
        assert sum(item.tokens for item in result.by_conversation.values()) == tokens


def test_the_mode_of_the_model_is_restored(model: PeftModel, sequences: tuple[Sequence, ...]) -> None:
    for training in (True, False):
        model.train(training)
        _run(model, sequences[:2], 2)
        assert model.training is training


def test_a_perplexity_that_overflows_is_infinite(model: PeftModel, sequences: tuple[Sequence, ...]) -> None:
    result = _run(model, sequences[:1], 1)
    huge = Evaluation(total=type(result.total)(nll=1e6, correct=0, tokens=1), by_conversation=result.by_conversation)
    assert huge.perplexity == math.inf
    assert huge.plain()["perplexity"] is None


def test_an_adapter_is_compared_with_its_own_base_only(
    model: PeftModel, base: Path, other_base: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    export_adapter(model, open_base(base), adapter, {"default_system": "Be brief."})
    file = tmp_path / "held.jsonl"
    file.write_text(json.dumps({"dialogue": [{"user": "Hi", "assistant": "Hello"}]}) + "\n")
    result = assess(adapter, base, [file], device="cpu", batch_size=2)
    assert result.base.total.tokens == result.adapter.total.tokens > 0
    assert result.base.loss != result.adapter.loss
    assert result.better_share in (0.0, 1.0)
    with pytest.raises(ConfigError, match=r"was trained on base .* \(weights differ\)"):
        assess(adapter, other_base, [file], device="cpu", batch_size=2)
    manifest = (adapter / "loramux_manifest.json").read_text()
    (adapter / "loramux_manifest.json").write_text(manifest.replace('"Be brief."', "3"))
    with pytest.raises(ConfigError, match=r"loramux_manifest\.json is not as a run wrote it \(default_system\)"):
        assess(adapter, base, [file], device="cpu", batch_size=2)
    (adapter / "loramux_manifest.json").write_text(manifest)
    tensors = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    tensors[-3] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(tensors)
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors is not as the run wrote it"):
        assess(adapter, base, [file], device="cpu", batch_size=2)
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="adapter_model"):
        assess(adapter, base, [file], device="cpu", batch_size=2)
    shutil.rmtree(adapter)
    export_adapter(model, open_base(base), adapter, {})
    file.write_text("{}\n")
    with pytest.raises(DataError, match=r"held\.jsonl:1"):
        assess(adapter, base, [file], device="cpu", batch_size=2)
