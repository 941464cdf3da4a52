"""What was trained here answers in our engine as it does in PEFT on the same NF4 bytes."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from loramux import ChatMessage, Client, VersionState
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.messages import Add, Done, PromptLogprobs, SamplingSpec
from loramux_trainer.base import choose_numerics, load_model, open_base
from loramux_trainer.data.codec import Codec
from loramux_trainer.data.prepared import prepare
from loramux_trainer.errors import PublishRefused
from loramux_trainer.lora import load_lora
from loramux_trainer.publish import Target, publish
from loramux_trainer.run import Result, train
from tests.e2e.real_server import real_server
from tests.support.engine_runs import RealEngine
from tests.support.tiny_models import make_adapter
from tests.unit.trainer.conftest import small_run

TOLERANCE = 2e-4
"""Nats; both compute in float32, in another order."""


def _served(engine: RealEngine, prompts: dict[str, tuple[list[int], str | None]]) -> dict[str, list[float]]:
    """Log-probability of each prompt token but the first, all prompts in one batch."""
    found: dict[str, dict[int, float]] = {name: {} for name in prompts}
    sampling = SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    engine.engine.handle(
        Add(request_id=name, prompt_token_ids=ids, sampling=sampling, version=version)
        for name, (ids, version) in prompts.items()
    )
    left = len(prompts)
    while left:
        for event in engine.engine.step():
            if isinstance(event, PromptLogprobs):
                for position, entry in enumerate(event.entries, start=event.start):
                    found[event.request_id][position] = entry.logprob
            elif isinstance(event, Done):
                assert event.status == "finished", event
                left -= 1
    return {name: [found[name][position] for position in range(1, len(ids))] for name, (ids, _) in prompts.items()}


def test_served_mixed_it_answers_as_peft_does(finished: Result, base: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", base, seed=5)
    config = small_run(base, tmp_path)
    rows = prepare(config.data, Codec.from_directory(base), seed=7, max_length=128).validation
    versions = {
        name: f"tenants/default/adapters/a{index}/versions/0" for index, name in enumerate(("trained", "other"))
    }
    engine = RealEngine(
        EngineConfig(model=str(base), weights="nf4", device="cpu", kv_pages=256, threads=1, self_test=False),
        [finished.adapter, other],
    )
    try:
        served = _served(
            engine,
            {
                f"{user} {number}": (list(row.input_ids), versions.get(user))
                for number, row in enumerate(rows)
                for user in ("base", "trained", "other")
            },
        )
    finally:
        engine.close()
    model = load_lora(load_model(open_base(base), choose_numerics("cpu")), finished.adapter)
    apart = 0.0
    for number, row in enumerate(rows):
        ids = list(row.input_ids)
        trained = _logprobs(model, ids)
        with model.disable_adapter():
            alone = _logprobs(model, ids)
        for user, expected in (("trained", trained), ("base", alone)):
            worst = max(abs(a - b) for a, b in zip(expected, served[f"{user} {number}"], strict=True))
            assert worst < TOLERANCE, (user, number, worst)
        apart += math.fsum(abs(a - b) for a, b in zip(trained, alone, strict=True)) / len(trained)
    assert apart / len(rows) > 0.3, "the adapter changes what the base says, so that the comparison means something"


def _logprobs(model: PeftModel, ids: list[int]) -> list[float]:
    with torch.no_grad():
        table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    return [float(table[position - 1, ids[position]]) for position in range(1, len(ids))]


def test_published_it_answers_chats_with_the_trained_prompt(
    finished: Result, base: Path, other_base: Path, tmp_path: Path
) -> None:
    foreign = train(small_run(other_base, tmp_path, max_steps=1), console=Console(quiet=True))
    codec = Codec.from_directory(base)
    question = [ChatMessage(role="user", content="Where is order 77?")]
    with real_server(base, tmp_path / "store", "--kv-pages", "256", "--weights", "nf4") as server:
        target = Target(server=server.address, name="acme")
        version = publish(finished.adapter, target)
        assert (version.digest, version.state) == (finished.digest, VersionState.READY)
        assert version.base_fingerprint == open_base(base).fingerprint.hex
        with pytest.raises(PublishRefused, match=r"was trained on base .* \(weights differ\)") as caught:
            publish(foreign.adapter, target)
        assert caught.value.exit_code == 6
        with Client(server.address, adapter="acme") as client:
            answer = client.generate(question, temperature=0, max_tokens=12, ignore_eos=True).result()
    model = load_lora(load_model(open_base(base), choose_numerics("cpu")), finished.adapter)
    ids = codec.encode(codec.prompt([{"role": "user", "content": question[0].content}]))
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.started.adapter is not None
    assert answer.started.adapter.digest == finished.digest
    assert answer.usage.prompt_tokens == prompt
    assert list(answer.token_ids) == ids[prompt:]
