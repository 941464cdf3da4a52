import errno
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from trl import SFTTrainer

from loramux_base.adapter import version_digest
from loramux_base.fingerprint import base_fingerprint
from loramux_server.lora import worker, worker_messages
from loramux_trainer.base import choose_numerics, load_model, open_base
from loramux_trainer.config import RunConfig
from loramux_trainer.data.codec import Codec
from loramux_trainer.data.prepared import prepare
from loramux_trainer.errors import ConfigError, DataError, NonFinite, OutOfMemory
from loramux_trainer.evaluate import evaluate
from loramux_trainer.lora import add_lora
from loramux_trainer.run import Result, train
from loramux_trainer.sft import AdapterTrainer, training_arguments
from tests.support.tiny_models import make_checkpoint
from tests.unit.trainer.conftest import write_jsonl

Settings = Callable[..., RunConfig]
QUIET = Console(quiet=True)


def _files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _validate(adapter: Path, base: Path) -> worker_messages.Answer:
    fingerprint = base_fingerprint(base)
    return worker.validate(
        worker_messages.ValidateAdapter(
            id=1,
            directory=str(adapter),
            base_config=str(base / "config.json"),
            max_rank=64,
            base_fingerprint=fingerprint.hex,
            base_parts=dict(fingerprint.parts),
            allow_unverified=False,
        )
    )


def test_a_run_learns_counts_and_is_taken_by_the_server(finished: Result, base: Path, other_base: Path) -> None:
    run = finished.adapter.parent
    evaluation = finished.manifest["evaluation"]
    assert evaluation["adapter"]["loss"] < evaluation["base"]["loss"] - 1
    assert evaluation["adapter"]["loss_tokens"] == finished.manifest["data"]["validation"]["loss_tokens"]
    assert finished.manifest["loss_tokens_trained"] == 2 * finished.manifest["data"]["train"]["loss_tokens"]

    lines = _metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, finished.manifest["steps"] + 1))
    assert {line["step"] for line in lines if "eval_loss" in line} == {6, 12}
    assert not [name for line in lines for name in line if "entropy" in name or "mean_token" in name]
    last = [line for line in lines if "eval_loss" in line][-1]
    assert last["eval_loss"] == pytest.approx(evaluation["adapter"]["loss"], rel=1e-6)

    assert sorted(_files(finished.adapter)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loramux_manifest.json",
    ]
    assert str(base.parent) not in (finished.adapter / "adapter_config.json").read_text()
    assert finished.digest == version_digest(finished.adapter)
    answer = _validate(finished.adapter, base)
    assert isinstance(answer, worker_messages.Validated), answer
    assert (answer.digest, answer.base_verified, answer.rank) == (finished.digest, True, 8)
    refusal = _validate(finished.adapter, other_base)
    assert isinstance(refusal, worker_messages.Refused)
    assert "weights differ" in refusal.message


def test_equal_seeds_give_equal_bytes_and_other_seeds_others(finished: Result, settings: Settings) -> None:
    again = train(settings("again", log_steps=5, save_steps=4), console=QUIET)
    assert _files(again.adapter) == _files(finished.adapter), "nor does it matter how often is logged, tested and saved"
    other = settings("other", max_steps=2).model_copy(update={"seed": 8})
    assert train(other, console=QUIET).digest != train(settings("third", max_steps=2), console=QUIET).digest


def test_the_loop_divides_by_the_datas_own_count(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    divisors: dict[int, int] = {}
    original = AdapterTrainer.training_step

    def observed(self: AdapterTrainer, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        divisors.setdefault(self.state.global_step, int(num_items_in_batch))
        return original(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(AdapterTrainer, "training_step", observed)
    result = train(settings(), console=QUIET)
    assert len(divisors) == result.manifest["steps"] == 12
    per_epoch = [sum(divisors[step] for step in range(first, first + 6)) for first in (0, 6)]
    assert per_epoch == [result.manifest["data"]["train"]["loss_tokens"]] * 2
    assert result.manifest["loss_tokens_trained"] == sum(per_epoch)


@pytest.mark.parametrize("name", ["file", "file/below", "link", "x" * 300, "/proc/none/run"])
def test_an_output_that_cannot_be_made_is_named(settings: Settings, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(ConfigError, match=r"^output: .*; .*give another") as caught:
        train(settings(name), console=QUIET)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "file", "link"]


def test_a_full_disk_ends_in_a_line(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", full)
    config = settings(max_steps=1)
    with pytest.raises(ConfigError, match=r"^output: .* cannot be used \(No space left on device\)"):
        train(config, console=QUIET)
    assert not (config.output / "adapter").exists()


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_loop_counts_the_tokens_of_the_data(settings: Settings, tmp_path: Path, family: str) -> None:
    base = make_checkpoint(tmp_path / family, family)
    config, numerics = settings(), choose_numerics("cpu")
    codec = Codec.from_directory(base)
    data = prepare(config.data, codec, seed=config.seed, max_length=128)
    trainer = AdapterTrainer(
        add_lora(load_model(open_base(base), numerics), config.lora, seed=1),
        training_arguments(config, numerics, directory=tmp_path / "c", steps=6),
        codec=codec,
        tokenizer_file=base / "tokenizer.json",
        train=data.train,
        validation=data.validation,
        eval_batch_size=2,
    )
    counted, nll, rows = 0, 0.0, []
    for batch in trainer.get_train_dataloader():
        rows += batch.pop("rows").tolist()
        with torch.no_grad():
            output = trainer.model(**batch, use_cache=False, fused_lm_head=True)
        counted += int(output.label_mask.sum())
        nll -= float(output.log_probs.double().sum())
        shown = batch["attention_mask"].bool()
        assert sorted(batch["input_ids"][index][shown[index]].tolist() for index in range(len(shown))) == sorted(
            list(data.train[row].input_ids) for row in rows[-len(shown) :]
        )
    assert sorted(rows) == list(range(len(data.train))), "TRL neither drops nor repeats rows"
    assert counted == data.report["train"]["loss_tokens"] == sum(item.loss_tokens for item in data.train)
    ours = evaluate(trainer.model, data.train, pad_id=codec.pad_id, batch_size=3, device=numerics.device)
    assert nll == pytest.approx(ours.total.nll, rel=1e-5), "TRL's fused loss and our evaluation see one model"


def test_everything_that_is_overridden_is_there() -> None:
    for name in ("_send_telemetry", "create_model_card", "training_step", "log", "evaluate", "compute_loss"):
        assert callable(getattr(SFTTrainer, name))
    for name in ("_save_checkpoint", "_load_from_checkpoint", "_load_best_model", "compute_loss_context_manager"):
        assert callable(getattr(SFTTrainer, name))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original = SFTTrainer.compute_loss
    calls = []

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = original(self, *args, **kwargs)
        if len(calls) < 5:
            return loss
        # the root of zero has a finite value and an infinite slope
        return loss * math.nan if where == "loss" else loss + torch.sqrt(loss - loss.detach())

    monkeypatch.setattr(SFTTrainer, "compute_loss", poisoned)
    config = settings()
    with pytest.raises(NonFinite, match=r"step 3: .* on data\.jsonl:\d+, data\.jsonl:\d+; no adapter") as caught:
        train(config, console=QUIET)
    assert caught.value.exit_code == 4
    assert not (config.output / "adapter").exists()


def test_out_of_memory_is_named_with_the_way_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    monkeypatch.setattr(SFTTrainer, "compute_loss", full)
    with pytest.raises(OutOfMemory, match=r"train\.batch_size 2 .*lower batch_size") as caught:
        train(settings(), console=QUIET)
    assert caught.value.exit_code == 3


TURN = {"user": "Where?", "assistant": "Here."}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "bad JSON"),
        (json.dumps({"dialogue": [{"user": "a", "assistant": " "}]}), "empty turn"),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "no assistant turn"),
        (json.dumps({"messages": [{"role": "assistant", "content": "a"}]}), "wrong role order"),
        (json.dumps({"dialogue": [{"user": "a", "assistant": "b<|im_end|>"}]}), "special token"),
    ],
)
def test_broken_data_is_named_and_nothing_is_written(
    settings: Settings, tmp_path: Path, line: str, reason: str
) -> None:
    config = settings()
    file = config.data.train[0]
    file.write_text(file.read_text() + line + "\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=reason) as caught:
        train(config, console=QUIET)
    assert caught.value.exit_code == 2
    assert [(problem.file, problem.line) for problem in caught.value.problems] == [(file, 25)]
    assert sorted(tmp_path.rglob("*")) == before


def test_long_conversations_are_left_out_and_reported_unless_all_are(settings: Settings, tmp_path: Path) -> None:
    config = settings(max_steps=1)
    long = {"dialogue": [{"user": "word " * 200, "assistant": "b"}]}
    file = write_jsonl(tmp_path / "long.jsonl", [long, *({"dialogue": [{**TURN, "user": f"{n}?"}]} for n in range(9))])
    data = config.data.model_copy(update={"train": (file,), "validation_share": 0.0})
    result = train(config.model_copy(update={"data": data}), console=QUIET)
    assert result.manifest["data"]["train"]["too_long"] == 1
    assert "evaluation" not in result.manifest
    report = json.loads((config.output / "run.json").read_text())["data"]["train"]
    assert report["too_long_places"][0].startswith("long.jsonl:1: too long: ")

    strict = data.model_copy(update={"too_long": "error"})
    with pytest.raises(DataError, match=r"long\.jsonl:1: too long"):
        train(config.model_copy(update={"data": strict, "output": tmp_path / "strict"}), console=QUIET)
    write_jsonl(file, [long])
    with pytest.raises(DataError, match=r"long\.jsonl:1: too long"):
        train(config.model_copy(update={"data": data, "output": tmp_path / "all"}), console=QUIET)
    assert not (tmp_path / "strict").exists()
    assert not (tmp_path / "all").exists()


def test_a_base_with_fewer_positions_is_refused(settings: Settings) -> None:
    config = settings()
    data = config.data.model_copy(update={"max_length": 4096})
    with pytest.raises(ConfigError, match=r"data\.max_length: is 4096, the base has 2048 positions"):
        train(config.model_copy(update={"data": data}), console=QUIET)


def test_the_length_follows_the_base_unless_set(settings: Settings) -> None:
    config = settings(max_steps=1)
    data = config.data.model_copy(update={"max_length": None})
    result = train(config.model_copy(update={"data": data}), console=QUIET)
    assert result.manifest["data"]["max_length"] == 1024


def test_a_tokenizer_that_is_not_the_models_is_refused(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    copy = tmp_path / "copy"
    shutil.copytree(config.base, copy)
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"gives token id \d+, its model has 100"):
        train(config.model_copy(update={"base": copy}), console=QUIET)
    assert not config.output.exists()


def test_a_terminal_gets_a_bar_and_a_pipe_lines(settings: Settings) -> None:
    shown = {}
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=160, legacy_windows=False)
        train(settings(f"terminal {terminal}", max_steps=4, log_steps=2), console=console)
        shown[terminal] = stream.getvalue()
    assert "training" in shown[True]
    assert "4/4" in shown[True]
    assert "\x1b" not in shown[False]
    assert "step 4/4  loss " in shown[False]


def test_a_launcher_of_several_processes_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = settings()
    with pytest.raises(ConfigError, match="several devices"):
        train(config, console=QUIET)
    assert not config.output.exists()


def test_the_best_state_is_kept_and_a_run_that_gets_no_better_ends(settings: Settings) -> None:
    config = settings(keep="best", patience=2, eval_steps=2, learning_rate=0.3, epochs=10.0, schedule="constant")
    result = train(config, console=QUIET)
    losses = {line["step"]: line["eval_loss"] for line in _metrics(config.output) if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert result.manifest["best_step"] == best
    assert result.manifest["steps"] == best + 4 < 60
    assert result.manifest["evaluation"]["adapter"]["loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_base_without_all_tensors_leaves_no_output(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    copy = tmp_path / "copy"
    shutil.copytree(config.base, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"do not fit its model class \(for example model\.norm\.weight"):
        train(config.model_copy(update={"base": copy}), console=QUIET)
    assert not config.output.exists()
