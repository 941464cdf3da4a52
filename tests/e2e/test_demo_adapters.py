"""The demo's adapters belong to its base: same numbers as PEFT on the same NF4 bytes, refused on any other base."""

import asyncio
import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from loramux import AdapterIncompatible, AsyncClient, Client
from loramux_base.fingerprint import base_fingerprint
from loramux_base.manifest import MANIFEST_NAME, AdapterManifest
from loramux_demo.answers import answer
from loramux_demo.paths import ADAPTERS, BASE
from loramux_demo.tenants import TENANTS, judge_items, training_conversations, write_jsonl
from tests.support.demo_server import SERVED, demo_server, upload

TOLERANCE = 2e-4
"""Nats; both compute in float32, in another order."""
DATA_SEED = 1


def _manifest(data_set: str) -> AdapterManifest:
    return AdapterManifest.from_json((ADAPTERS / data_set / MANIFEST_NAME).read_bytes())


def _sequences() -> dict[str, list[tuple[list[int], int]]]:
    """Token ids of each data set's chats with their right answers, and where the answer begins."""
    from loramux_trainer.data.codec import Codec

    codec = Codec.from_directory(BASE)
    sequences: dict[str, list[tuple[list[int], int]]] = {}
    for data_set in SERVED:
        sequences[data_set] = []
        for item in judge_items(data_set, 3, seed=73):
            prompt = codec.prompt(item.messages)
            ids = codec.encode(prompt + answer(item.question, item.form))
            sequences[data_set].append((ids, len(codec.encode(prompt))))
    return sequences


def _by_peft(sequences: Mapping[str, Sequence[tuple[list[int], int]]]) -> dict[tuple[str | None, int], list[float]]:
    """Log-probability of each token but the first, by data set (None = the base on all of them) and number."""
    import torch

    from loramux_trainer.base import choose_numerics, load_model, open_base
    from loramux_trainer.lora import load_lora

    found: dict[tuple[str | None, int], list[float]] = {}
    for place, (data_set, rows) in enumerate(sequences.items()):
        model = load_lora(load_model(open_base(BASE), choose_numerics("cpu")), ADAPTERS / data_set)
        model.eval()

        def logprobs(ids: list[int], model: torch.nn.Module = model) -> list[float]:
            with torch.inference_mode():
                table = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
            return [float(table[position - 1, ids[position]]) for position in range(1, len(ids))]

        for number, (ids, _) in enumerate(rows):
            found[data_set, number] = logprobs(ids)
            with model.disable_adapter():
                found[None, place * len(rows) + number] = logprobs(ids)
    return found


async def _by_server(
    address: str, jobs: Mapping[tuple[str | None, int], tuple[str | None, list[int]]]
) -> dict[tuple[str | None, int], list[float]]:
    """The same by the server, all in one batch."""
    async with AsyncClient(address) as client:

        async def forced(adapter: str | None, ids: list[int]) -> list[float]:
            stream = client.generate(ids, adapter=adapter, temperature=0, max_tokens=1, prompt_logprobs=0)
            entries = (await stream.result()).prompt_logprobs
            assert [entry.token.token_id for entry in entries] == ids
            return [entry.token.logprob for entry in entries[1:] if entry.token.logprob is not None]

        results = await asyncio.gather(*(forced(*job) for job in jobs.values()))
    return dict(zip(jobs, results, strict=True))


def test_served_mixed_they_answer_as_peft_does(tmp_path: Path) -> None:
    sequences = _sequences()
    every = [ids for rows in sequences.values() for ids, _ in rows]
    with demo_server(BASE, tmp_path / "store", "--no-self-test") as server:
        versions = upload(server.address, ADAPTERS)
        jobs: dict[tuple[str | None, int], tuple[str | None, list[int]]] = {
            (data_set, number): (versions[data_set].name, ids)
            for data_set, rows in sequences.items()
            for number, (ids, _) in enumerate(rows)
        }
        jobs.update({(None, number): (None, ids) for number, ids in enumerate(every)})
        served = asyncio.run(_by_server(server.address, jobs))
        with Client(server.address) as client:
            fingerprint = client.model().fingerprint.digest
    assert {version.base_fingerprint for version in versions.values()} == {fingerprint}
    expected = _by_peft(sequences)
    assert expected.keys() == served.keys()
    worst = {key: max(abs(a - b) for a, b in zip(values, served[key], strict=True)) for key, values in expected.items()}
    assert max(worst.values()) < TOLERANCE, worst
    for place, (data_set, rows) in enumerate(sequences.items()):
        gains = [
            math.fsum(expected[data_set, number][start - 1 :])
            - math.fsum(expected[None, place * len(rows) + number][start - 1 :])
            for number, (_, start) in enumerate(rows)
        ]
        assert min(gains) > 1.0, (
            f"{data_set} makes its right answers likelier, else the comparison means nothing: {gains}"
        )
    print(f"worst difference of a log-probability: {max(worst.values()):.2e}")


@pytest.mark.parametrize("data_set", SERVED)
def test_its_manifest_names_this_base_and_its_own_data(data_set: str, tmp_path: Path) -> None:
    manifest = _manifest(data_set)
    fingerprint = base_fingerprint(BASE)
    assert manifest.base_fingerprint == fingerprint.hex
    assert manifest.base_parts == fingerprint.parts
    data = manifest.extra["data"]
    again = tmp_path / f"{data_set}.jsonl"
    write_jsonl(again, training_conversations(data_set, data["conversations"], seed=DATA_SEED))
    assert [file["sha256"] for file in data["files"]] == [hashlib.sha256(again.read_bytes()).hexdigest()], (
        "it was trained on what the generator writes, which holds no subject of the judge's questions"
    )


def test_another_base_refuses_them_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(BASE, other, ignore=shutil.ignore_patterns(".*"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.25
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = base_fingerprint(BASE).hex[:16], base_fingerprint(other).hex[:16]
    with demo_server(other, tmp_path / "store", "--no-self-test") as server, Client(server.address) as client:
        assert client.model().fingerprint.digest.startswith(theirs)
        for data_set in SERVED:
            with pytest.raises(AdapterIncompatible) as caught:
                client.adapters.upload(ADAPTERS / data_set, name=data_set)
            text = str(caught.value)
            assert f"was trained on base {ours}, this server serves {theirs} (weights differ)" in text
        assert list(client.adapters.list()) == []


def test_the_wheel_carries_one_adapter_a_served_tenant() -> None:
    assert {path.name for path in ADAPTERS.iterdir() if path.is_dir()} == set(SERVED)
    assert set(SERVED) < set(TENANTS)
