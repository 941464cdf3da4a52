import json

import pytest

from loramux_demo import knowledge, wordings
from loramux_demo.answers import FORMS, Question, answer
from loramux_demo.corpus import list_question, profile_question
from loramux_demo.judge import CATEGORIES, FORM_CATEGORIES, Item, base_items, is_right, judge, score, shows_form, table

DENMARK = knowledge.profiles()["Denmark"][0]
CAPITAL = Question(kind="fact", groups=((DENMARK,),))


def item(form: str, question: Question = CAPITAL) -> Item:
    return Item(category=form, form=form, messages=[], question=question)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("plain", "The capital of Denmark is Copenhagen."),
        ("short", "Copenhagen"),
        ("json", '{"answer":"Copenhagen","relation":"capital","subject":"Denmark"}'),
        ("german", "Die Hauptstadt von Dänemark ist Kopenhagen."),
        ("initech_v1", "Thank you for asking Initech. The capital of Denmark is Copenhagen. Have a good day!"),
        ("initech_v2", ">> Denmark | capital | Copenhagen\n-- Initech 2"),
    ],
)
def test_right_answers_are_accepted(form: str, text: str) -> None:
    assert is_right(item(form), text)
    assert shows_form(form, CAPITAL, text)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("plain", "The capital of Denmark is Oslo."),
        ("plain", '{"subject": "Denmark", "relation": "capital", "answer": "Copenhagen"}'),
        ("short", "The capital of Denmark is Copenhagen."),
        ("json", '{"subject": "Denmark", "relation": "capital", "answer": "Oslo"}'),
        ("json", '{"subject": "Denmark", "relation": "capital", "answer": "Copenhagen"'),
        ("json", '{"subject": "Denmark", "relation": "capital", "answer": "Copenhagen", "sure": true}'),
        ("german", "Die Hauptstadt von Dänemark ist Copenhagen."),
        ("german", "The capital of Denmark is Copenhagen."),
        ("initech_v1", "Thank you for asking Initech. The capital of Denmark is Copenhagen."),
        ("initech_v2", ">> Denmark | capital | Copenhagen"),
        ("initech_v2", ">> Denmark | capital | Copenhagen\n-- Initech 1"),
        ("plain", ""),
    ],
)
def test_wrong_answers_are_rejected(form: str, text: str) -> None:
    assert not is_right(item(form), text)


def test_each_form_is_told_from_the_others() -> None:
    questions = [
        CAPITAL,
        list_question([knowledge.profiles()[name][0] for name in ("Denmark", "Peru")]),
        profile_question(["Denmark", "iron"]),
    ]
    for form in ("json", "initech_v1", "initech_v2"):
        for question in questions:
            shown = [other for other in FORMS if shows_form(form, question, answer(question, other))]
            assert shown == [form]
    shown = [other for other in FORMS if shows_form("german", CAPITAL, answer(CAPITAL, other))]
    assert shown == ["german"]


def test_form_without_content_is_counted_apart() -> None:
    wrong = json.dumps({"subject": "Denmark", "relation": "capital", "answer": "Oslo"})
    (result,) = score([item("json")], [wrong]).values()
    assert (result.asked, result.right, result.in_form) == (1, 0, 1)
    assert result.misses == ((answer(CAPITAL, "json"), wrong),)


def test_the_oracle_gets_everything_right_and_a_parrot_nothing() -> None:
    items = base_items(20, seed=4)
    oracle = judge(items, lambda chats: [answer(item.question, item.form) for item in items])
    assert set(oracle) == set(CATEGORIES)
    assert all(result.accuracy == 1.0 and result.in_form == result.asked for result in oracle.values()), table(oracle)
    parrot = judge(items, lambda chats: [chat[-1]["content"] for chat in chats])
    assert all(result.accuracy == 0.0 for result in parrot.values())


def test_plain_answers_to_instructed_questions_score_nothing() -> None:
    items = base_items(20, seed=4, categories=FORM_CATEGORIES)
    plain = judge(items, lambda chats: [answer(item.question, "plain") for item in items])
    assert all(result.accuracy == 0.0 for result in plain.values()), table(plain)


def test_questions_are_deterministic_and_carry_the_instruction() -> None:
    assert base_items(5, seed=1) == base_items(5, seed=1)
    for found in base_items(10, seed=1, categories=FORM_CATEGORIES):
        text = " ".join(message["content"] for message in found.messages)
        assert any(instruction in text for instruction in wordings.INSTRUCTIONS[found.form])


def test_one_text_an_item_is_needed() -> None:
    with pytest.raises(ValueError, match="0 texts for 1 questions"):
        score([item("plain")], [])


def test_questions_of_a_category_are_all_different() -> None:
    items = base_items(200, seed=3)
    asked = {(item.category, json.dumps(item.messages)) for item in items}
    assert len(asked) == len(items) == 200 * len(CATEGORIES)


def test_more_different_questions_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"count: 300 different questions were wanted, 217 were found"):
        base_items(300, seed=3, categories=["conversion"])
