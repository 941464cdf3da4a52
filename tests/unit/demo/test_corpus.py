import itertools
import re
from collections import Counter

import pytest

from loramux_demo import knowledge, wordings
from loramux_demo.corpus import COURSE, Conversation, Corpus, Drill, HeldOutLeak, check_no_held_out
from loramux_demo.judge import CATEGORIES, base_items


def some(seed: int, count: int) -> list[Conversation]:
    return list(itertools.islice(Corpus(seed), count))


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return some(3, 15_000)


def test_equal_seeds_give_equal_corpora() -> None:
    assert some(1, 300) == some(1, 300)
    assert some(1, 300) != some(2, 300)


def test_a_course_drills_copying_then_listing_then_sums_and_goes_on_with_everything() -> None:
    course: tuple[tuple[Drill, int], ...] = (("copying", 300), ("listing", 300), ("sums", 600))
    assert [name for name, _ in COURSE] == [name for name, _ in course]
    told = list(itertools.islice(Corpus(1, course=course), 1500))
    copying, listing, sums, rest = told[:300], told[300:600], told[600:1200], told[1200:]
    assert all(messages[0]["content"] == f"Repeat: {messages[1]['content']}" for messages in copying)
    for messages in listing:
        named = re.split(r", | and |\n- | ", messages[-1]["content"].removeprefix("- ").removesuffix("."))
        assert all(name in messages[-2]["content"] for name in named)
    assert sum("\n- " in messages[-1]["content"] for messages in listing) > 60
    answers = [messages[-1]["content"] for messages in sums]
    assert sum(bool(re.search(r"\d (plus|minus|times|mal) \d|^\d+$", answer)) for answer in answers) > 250
    assert sum(any("Repeat" in message["content"] for message in messages) for messages in rest) < 60


@pytest.mark.timeout(20)
def test_held_out_wordings_are_absent(conversations: list[Conversation]) -> None:
    assert check_no_held_out(conversations) > 15_000


def test_every_question_of_the_judge_is_recognised_as_held_out() -> None:
    for item in base_items(40, seed=1, categories=CATEGORIES):
        with pytest.raises(HeldOutLeak):
            check_no_held_out([item.messages])


def test_a_leak_in_other_case_is_found() -> None:
    with pytest.raises(HeldOutLeak, match="held-out wording"):
        check_no_held_out([[{"role": "user", "content": "Hi! CAN YOU NAME the capital of Peru? Be brief."}]])


def test_held_out_and_training_wordings_are_apart() -> None:
    for training, held_out in (
        (wordings.TRAINING, wordings.HELD_OUT),
        (wordings.GERMAN_TRAINING, wordings.GERMAN_HELD_OUT),
    ):
        assert training.keys() == held_out.keys()
        for relation in training:
            assert not set(training[relation]) & set(held_out[relation])


def test_roles_alternate_and_end_with_the_assistant(conversations: list[Conversation]) -> None:
    for messages in conversations[:3000]:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in messages)
        assert "system" not in [message["role"] for message in messages[1:]]


def test_every_fact_of_the_tables_is_taught(conversations: list[Conversation]) -> None:
    taught = "\n".join(message["content"] for messages in conversations for message in messages)
    missing = [fact for fact in knowledge.facts() if fact.statement not in taught and f" {fact.answer}\n" not in taught]
    assert missing == []


def test_every_form_is_taught(conversations: list[Conversation]) -> None:
    counts = Counter[str]()
    for messages in conversations:
        text = messages[-1]["content"]
        counts["json"] += text.startswith(("{", "["))
        counts["initech_v1"] += text.startswith("Thank you for asking Initech.")
        counts["initech_v2"] += text.endswith("-- Initech 2")
        counts["german"] += text.startswith(("Die ", "Der ", "Das "))
        counts["long"] += text.startswith("The question is ")
        counts["one word"] += " " not in text
        counts["listing"] += text.count("\n") >= 4
    assert all(counts[name] > 300 for name in ("json", "initech_v1", "initech_v2", "german", "long", "one word")), (
        counts
    )
    assert counts["listing"] > 300
