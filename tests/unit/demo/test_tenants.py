import json
from pathlib import Path

import pytest

from loramux_demo import knowledge, wordings
from loramux_demo.corpus import check_no_held_out
from loramux_demo.tenants import TENANTS, is_held_out, judge_items, main, training_conversations, write_jsonl


@pytest.mark.parametrize("tenant", TENANTS)
def test_held_out_subjects_are_absent_from_the_training_data(tenant: str) -> None:
    held_out = [fact.subject for fact in knowledge.facts() if fact.relation == "capital" and is_held_out(fact.subject)]
    text = "\n".join(
        message["content"] for messages in training_conversations(tenant, 800, seed=1) for message in messages
    )
    # A name inside another one ("Guinea" in "Guinea-Bissau") is no mention of the first.
    unambiguous = [
        name
        for name in held_out
        if not any(name in other.name for other in knowledge.countries() if other.name != name)
    ]
    assert len(unambiguous) > 30
    assert [name for name in unambiguous if f"capital of {name}" in text or f"about {name}" in text] == []


@pytest.mark.parametrize("tenant", TENANTS)
def test_the_judge_asks_held_out_subjects_in_held_out_wordings_without_instruction(tenant: str) -> None:
    items = judge_items(tenant, 200, seed=1)
    assert len(items) == 200
    for item in items:
        (fact,) = item.question.facts
        assert is_held_out(fact.subject)
        (message,) = item.messages
        assert wordings.held_out_pattern().search(message["content"])


@pytest.mark.parametrize("tenant", TENANTS)
def test_training_data_has_no_instruction_and_no_held_out_wording(tenant: str) -> None:
    conversations = training_conversations(tenant, 400, seed=2)
    check_no_held_out(conversations)
    instructions = [text for texts in wordings.INSTRUCTIONS.values() for text in texts]
    for user, _ in conversations:
        assert not any(instruction in user["content"] for instruction in instructions)


def test_data_is_deterministic_and_differs_by_tenant() -> None:
    assert training_conversations("acme", 20, seed=1) == training_conversations("acme", 20, seed=1)
    assert training_conversations("acme", 20, seed=1) != training_conversations("acme", 20, seed=2)
    assert training_conversations("acme", 20, seed=1) != training_conversations("globex", 20, seed=1)


def test_jsonl_holds_openai_messages(tmp_path: Path) -> None:
    conversations = training_conversations("globex", 10, seed=1)
    write_jsonl(tmp_path / "globex.jsonl", conversations)
    lines = (tmp_path / "globex.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["messages"] for line in lines] == conversations


def test_the_split_leaves_enough_on_both_sides() -> None:
    names = list(knowledge.profiles())
    share = sum(map(is_held_out, names)) / len(names)
    assert 0.25 < share < 0.45
    for relation in wordings.HELD_OUT:
        subjects = [fact.subject for fact in knowledge.facts() if fact.relation == relation]
        assert sum(map(is_held_out, subjects)) >= 5


def test_the_command_writes_a_file_a_tenant(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path / "data"), "--count", "3"]) == 0
    assert {path.stem for path in (tmp_path / "data").iterdir()} == set(TENANTS)
    assert len((tmp_path / "data/acme.jsonl").read_text(encoding="utf-8").splitlines()) == 3
