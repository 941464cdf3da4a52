import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from loramux_demo.corpus import Corpus
from loramux_demo.evaluate import TransformersModel
from loramux_demo.packing import pack
from loramux_demo.tokenizer import IGNORED, encode_conversations, train_tokenizer
from loramux_demo.train_base import TrainConfig, batch_loss, build_model, learning_rate_factor, main, train

TINY = TrainConfig(
    steps=12,
    minutes=0,
    vocab_size=600,
    tokenizer_conversations=400,
    hidden=64,
    intermediate=64,
    layers=1,
    heads=2,
    kv_heads=1,
    rows=1,
    length=192,
    longest=384,
    warmup=2,
    log_every=4,
)


def test_packed_loss_equals_the_loss_of_each_conversation_alone() -> None:
    corpus = Corpus(1)
    conversations = [corpus.conversation() for _ in range(900)]
    tokenizer = train_tokenizer(conversations, vocab_size=600)
    encoded = encode_conversations(tokenizer, conversations)
    torch.manual_seed(0)
    model = build_model(TINY, tokenizer).eval()
    (batch,) = next(pack(iter(encoded), rows=1, length=512, longest=512, pad_id=0))
    total = torch.zeros(())
    for segment in range(int(batch.segments.max()) + 1):
        chosen = batch.segments[0] == segment
        logits = model(input_ids=batch.ids[:, chosen]).logits[0, :-1]
        labels = batch.labels[0, chosen][1:]
        total = total + cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        torch.testing.assert_close(batch_loss(model, batch), total, rtol=1e-4, atol=1e-3)


def test_equal_seeds_train_equal_bases_and_the_loss_falls(tmp_path: Path) -> None:
    first = train(TINY, tmp_path / "a", device=torch.device("cpu"))
    second = train(TINY, tmp_path / "b", device=torch.device("cpu"))
    assert first["loss"] == second["loss"] < math.log(TINY.vocab_size) - 0.1
    assert first["steps"] == TINY.steps
    left = load_file(tmp_path / "a/dense/model.safetensors")
    right = load_file(tmp_path / "b/dense/model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert {tensor.dtype for tensor in left.values()} == {torch.bfloat16}


def test_a_worker_makes_the_same_batches(tmp_path: Path) -> None:
    alone = train(dataclasses.replace(TINY, steps=2), tmp_path / "a", device=torch.device("cpu"))
    beside = train(dataclasses.replace(TINY, steps=2, workers=1), tmp_path / "b", device=torch.device("cpu"))
    assert alone["loss"] == beside["loss"] and alone["tokens"] == beside["tokens"]


def test_going_on_from_a_checkpoint_keeps_what_it_learned(tmp_path: Path) -> None:
    first = train(TINY, tmp_path / "a", device=torch.device("cpu"))
    more = dataclasses.replace(TINY, seed=TINY.seed + 1, steps=4)
    second = train(more, tmp_path / "b", device=torch.device("cpu"), start=tmp_path / "a/dense")
    assert second["loss"] < first["loss"]
    names = ("tokenizer.json", "config.json", "chat_template.jinja")
    assert all((tmp_path / "a/dense" / name).read_text() == (tmp_path / "b/dense" / name).read_text() for name in names)


def test_the_command_trains_quantizes_and_the_result_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import loramux_demo.train_base as module

    monkeypatch.setattr(module, "TrainConfig", lambda **options: dataclasses.replace(TINY, **options))
    assert main(["--out", str(tmp_path / "base"), "--steps", "4"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "base/nf4/demo.json").read_text())["figures"]["steps"] == 4
    model = TransformersModel(tmp_path / "base/nf4", max_new_tokens=4)
    texts = model([[{"role": "user", "content": "What is 1 plus 1?"}]] * 3)
    assert len(texts) == 3 and len(set(texts)) == 1


def test_an_existing_base_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nf4").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--steps", "1"])
    assert stopped.value.code == 2
    assert "give a new directory" in capsys.readouterr().err


def test_no_time_and_no_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--minutes", "0"])
    assert stopped.value.code == 2


def test_a_batch_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--steps", "1", "--rows", "0"])
    assert stopped.value.code == 2
    assert "--rows 0 must be 1 or more" in capsys.readouterr().err


def test_the_default_model_is_of_the_promised_size() -> None:
    config = TrainConfig()
    corpus = Corpus(1)
    tokenizer = train_tokenizer([corpus.conversation() for _ in range(200)], vocab_size=600)
    parameters = sum(parameter.numel() for parameter in build_model(config, tokenizer).parameters())
    kv_width = config.hidden // config.heads * config.kv_heads
    assert 4_000_000 <= parameters <= 8_000_000
    assert all(width % 64 == 0 for width in (config.hidden, config.intermediate, kv_width))


def test_learning_rate_warms_up_and_decays() -> None:
    assert learning_rate_factor(0.0, 0, 10) == pytest.approx(0.1)
    assert learning_rate_factor(0.0, 9, 10) == pytest.approx(1.0)
    assert learning_rate_factor(0.5, 100, 10) == pytest.approx(0.51)
    assert learning_rate_factor(1.0, 100, 10) == pytest.approx(0.02)
