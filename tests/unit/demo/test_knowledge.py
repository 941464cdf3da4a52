import re
from collections import Counter

import pytest

from loramux_demo import knowledge


def test_tables_are_as_large_as_promised() -> None:
    assert len(knowledge.countries()) >= 150
    assert len(knowledge.elements()) >= 60
    assert len(knowledge.units()) >= 30


@pytest.mark.parametrize("field", ["name", "capital", "german", "german_capital", "german_of"])
def test_what_names_one_country_is_unique(field: str) -> None:
    counts = Counter(getattr(country, field) for country in knowledge.countries())
    assert [value for value, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("field", ["number", "symbol", "name", "german"])
def test_what_names_one_element_is_unique(field: str) -> None:
    counts = Counter(getattr(element, field) for element in knowledge.elements())
    assert [value for value, count in counts.items() if count > 1] == []


def test_atomic_numbers_rise_and_the_first_56_are_complete() -> None:
    numbers = [element.number for element in knowledge.elements()]
    assert numbers == sorted(numbers)
    assert numbers[:56] == list(range(1, 57))


def test_symbols_look_like_symbols() -> None:
    assert all(re.fullmatch(r"[A-Z][a-z]?", element.symbol) for element in knowledge.elements())


def test_one_currency_has_one_german_name() -> None:
    pairs = {(country.currency, country.german_currency) for country in knowledge.countries()}
    assert len(pairs) == len({english for english, _ in pairs}) == len({german for _, german in pairs})


def test_the_euro_is_where_it_is() -> None:
    euro = {country.name for country in knowledge.countries() if country.currency == "euro"}
    assert {"Germany", "Croatia", "Montenegro", "Cyprus"} <= euro
    assert not euro & {"Denmark", "Sweden", "Poland", "Switzerland", "United Kingdom"}


def test_regions_are_known_and_none_is_empty() -> None:
    assert {country.region for country in knowledge.countries()} == set(knowledge.REGIONS)


def test_german_of_phrases_agree_with_the_name() -> None:
    for country in knowledge.countries():
        article, *rest = country.german_of.split(" ")
        assert article in ("von", "der", "des")
        assert article != "von" or rest == country.german.split(" ")


def test_nothing_is_empty_or_has_stray_spaces() -> None:
    for fact in knowledge.facts():
        texts = (fact.subject, fact.answer, fact.statement, fact.german_subject, fact.german_answer)
        assert all(text and text == text.strip() and "  " not in text for text in (*texts, *fact.slots.values()))


def test_statements_hold_their_answers() -> None:
    for fact in knowledge.facts():
        assert fact.answer in fact.statement
        assert fact.german_answer in fact.german_statement


def test_arithmetic_is_right_and_never_negative() -> None:
    rows = list(knowledge.sums())
    operations = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    assert all(operations[operation](left, right) == result >= 0 for left, operation, right, result in rows)
    assert len(rows) == len(set(rows))


def test_a_subject_and_a_relation_give_one_answer() -> None:
    counts = Counter((fact.relation, fact.subject) for fact in knowledge.facts())
    assert max(counts.values()) == 1


@pytest.mark.parametrize(
    ("relation", "subject", "statement", "german"),
    [
        ("capital", "Denmark", "The capital of Denmark is Copenhagen.", "Die Hauptstadt von Dänemark ist Kopenhagen."),
        (
            "currency",
            "Switzerland",
            "The currency of Switzerland is the Swiss franc.",
            "Die Währung der Schweiz ist Schweizer Franken.",
        ),
        (
            "continent",
            "Netherlands",
            "The continent of the Netherlands is Europe.",
            "Der Kontinent der Niederlande ist Europa.",
        ),
        ("symbol", "iron", "The symbol of iron is Fe.", "Das Symbol von Eisen ist Fe."),
        ("conversion", "hour", "There are 60 minutes in one hour.", "In einer Stunde sind 60 Minuten."),
        ("arithmetic", "7 times 8", "7 times 8 is 56.", "7 mal 8 ist 56."),
    ],
)
def test_sentences(relation: str, subject: str, statement: str, german: str) -> None:
    (fact,) = [fact for fact in knowledge.facts() if (fact.relation, fact.subject) == (relation, subject)]
    assert (fact.statement, fact.german_statement) == (statement, german)
