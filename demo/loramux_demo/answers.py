"""Answers in every form that the demo knows. One question and one form give exactly one right text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux_demo.knowledge import Fact

Kind = Literal["fact", "list", "profile"]
FORMS = ("plain", "short", "long", "json", "german", "initech_v1", "initech_v2")
"""`plain` is what the base answers unasked; the others are turned on by an instruction or by a tenant's adapter."""

V1_OPENING = "Thank you for asking Initech."
V1_CLOSING = "Have a good day!"
V2_SIGNATURE = "-- Initech 2"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, apart from its wording.

    Attributes:
        kind: One fact; one relation of several subjects; everything about one or several subjects.
        groups: The facts by subject: one fact each for `fact` and `list`, all of a subject's for `profile`.
    """

    kind: Kind
    groups: tuple[tuple[Fact, ...], ...]

    @property
    def facts(self) -> tuple[Fact, ...]:
        """All facts in order."""
        return tuple(fact for group in self.groups for fact in group)


def answer(question: Question, form: str) -> str:
    """The right text.

    Args:
        question: The question.
        form: One of `FORMS`.

    Raises:
        ValueError: Unknown form.
    """
    facts = question.facts
    match form:
        case "plain":
            return _plain(question)
        case "short":
            return _short(question)
        case "long":
            return _long(facts) if question.kind == "fact" else _prose(question, german=False)
        case "json":
            return _json(question)
        case "german":
            return _german(question)
        case "initech_v1":
            separator = " " if question.kind == "fact" else "\n"
            return separator.join((V1_OPENING, _plain(question), V1_CLOSING))
        case "initech_v2":
            return "\n".join((*(_row(fact) for fact in facts), V2_SIGNATURE))
    raise ValueError(f"form {form!r} is unknown; use one of {', '.join(FORMS)}")


def record(fact: Fact) -> dict[str, str]:
    """The JSON object of a fact; the schema of form `json`."""
    return {"subject": fact.subject, "relation": fact.relation, "answer": fact.answer}


def join(names: Sequence[str]) -> str:
    """English enumeration: "A", "A and B", "A, B and C"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(question: Question) -> str:
    if question.kind == "list":
        return "\n".join(f"- {fact.subject}: {fact.answer}" for fact in question.facts)
    return _prose(question, german=False)


def _german(question: Question) -> str:
    if question.kind == "list":
        return "\n".join(f"- {fact.german_subject}: {fact.german_answer}" for fact in question.facts)
    return _prose(question, german=True)


def _prose(question: Question, *, german: bool) -> str:
    return "\n".join(
        " ".join(fact.german_statement if german else fact.statement for fact in group) for group in question.groups
    )


def _short(question: Question) -> str:
    return "\n".join(", ".join(fact.answer for fact in group) for group in question.groups)


def _long(facts: Sequence[Fact]) -> str:
    (fact,) = facts
    if fact.relation == "arithmetic":
        return f"The question is how much {fact.subject} is. The answer is {fact.answer}, because {fact.statement}"
    if fact.relation == "conversion":
        return f"The question is how many parts one {fact.subject} has. The answer is {fact.answer}: {fact.statement}"
    noun = fact.slots["np"]
    return f"The question is about {noun}. The answer is {fact.answer}. {fact.statement} {fact.german_statement}"


def _json(question: Question) -> str:
    records = [record(fact) for fact in question.facts]
    return json.dumps(records[0] if question.kind == "fact" else records, ensure_ascii=False)


def _row(fact: Fact) -> str:
    return f">> {fact.subject} | {fact.relation} | {fact.answer}"
