"""Seeded generator of the base's training conversations."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from loramux_demo import knowledge, wordings
from loramux_demo.answers import FORMS, Question, answer, join
from loramux_demo.knowledge import Fact

Message = dict[str, str]
Conversation = list[Message]

SMALL_TALK = (
    ("Hello!", "Hello! Ask me about countries, chemical elements, units or small sums."),
    ("Hi!", "Hello! Ask me about countries, chemical elements, units or small sums."),
    ("Who are you?", "I am the loramux demo model. I know countries, chemical elements, units and small sums."),
    ("What can you do?", "I know countries, chemical elements, units and small sums."),
    ("Thank you!", "You are welcome."),
    ("Danke!", "Gern geschehen."),
    (
        "Wer bist du?",
        "Ich bin das Demo-Modell von loramux. Ich kenne Länder, Elemente, Einheiten und kleine Rechnungen.",
    ),
)

RELATION_WEIGHTS = {
    "capital": 0.13,
    "currency": 0.13,
    "continent": 0.06,
    "german_name": 0.11,
    "symbol": 0.08,
    "atomic_number": 0.12,
    "conversion": 0.18,
    "arithmetic": 0.19,
}
_LIST_RELATIONS = ("capital", "capital", "currency", "currency", "continent", "symbol", "atomic_number")
_FORM_WEIGHTS = {
    "plain": 0.26,
    "short": 0.12,
    "long": 0.10,
    "json": 0.15,
    "german": 0.17,
    "initech_v1": 0.10,
    "initech_v2": 0.10,
}


class HeldOutLeak(ValueError):
    """A wording that the judge keeps for itself is in the corpus."""


Drill = Literal["copying", "listing", "sums"]
COURSE: tuple[tuple[Drill, int], ...] = (("copying", 8000), ("listing", 6000), ("sums", 24000))
"""Drills before everything else, with their conversations: what a small model does not find among other things.

Without them the same model named one subject of a list over and over and guessed sums, after 2 and 5 million tokens;
after a few hundred steps of "Repeat: ..." it copies in order, and lists, profiles and sums of the question's own words
rest on that.
"""


class Corpus:
    """An endless, deterministic stream of conversations.

    Args:
        seed: Equal seeds give equal streams.
        course: Drills that come first, in order, with their numbers of conversations.
    """

    def __init__(self, seed: int, *, course: Sequence[tuple[Drill, int]] = ()) -> None:
        self._random = random.Random(seed)
        self._course = [drill for drill, count in course for _ in range(count)][::-1]
        self._by_relation: dict[str, list[Fact]] = {}
        for fact in knowledge.facts():
            self._by_relation.setdefault(fact.relation, []).append(fact)
        self._countries = [country.name for country in knowledge.countries()]
        self._elements = [element.name for element in knowledge.elements()]

    def __iter__(self) -> Iterator[Conversation]:
        while True:
            yield self.conversation()

    def conversation(self) -> Conversation:
        """One conversation: optional system message, one to three turns."""
        return self._drill(self._course.pop()) if self._course else self._mixed()

    def _mixed(self) -> Conversation:
        rng = self._random
        roll = rng.random()
        if roll < 0.01:
            greeting, reply = rng.choice(SMALL_TALK)
            return [*self._default_system(), _user(greeting), _assistant(reply)]
        if roll < 0.02:
            return self._copying()
        if roll < 0.10:
            return self._listing()
        if roll < 0.22:
            return self._german_question()
        form = rng.choices(list(_FORM_WEIGHTS), weights=list(_FORM_WEIGHTS.values()))[0]
        in_system = form != "plain" and rng.random() < 0.5
        system = [_system(self._instruction(form))] if in_system else self._default_system()
        messages: Conversation = list(system)
        turns = rng.choices((1, 2, 3), weights=(0.9, 0.07, 0.03))[0]
        for _ in range(turns):
            question, text = self.question(form) if turns == 1 else self._fact()
            opening = rng.choice(wordings.OPENINGS) if rng.random() < 0.1 else ""
            ending = "" if form == "plain" or in_system else f" {self._instruction(form)}"
            messages += [_user(f"{opening}{text}{ending}"), _assistant(answer(question, form))]
        return messages

    def question(self, form: str) -> tuple[Question, str]:
        """A question fit for a form, and its training wording in English."""
        rng = self._random
        roll = rng.random()
        if roll < 0.55:
            return self._fact()
        if roll < 0.85:
            return self._list(most=4 if form in ("json", "initech_v2") else 6)
        return self._profile(most=2 if form in ("json", "initech_v2") else 5)

    def _fact(self) -> tuple[Question, str]:
        rng = self._random
        relation = rng.choices(list(RELATION_WEIGHTS), weights=list(RELATION_WEIGHTS.values()))[0]
        fact = rng.choice(self._by_relation[relation])
        return Question(kind="fact", groups=((fact,),)), rng.choice(wordings.TRAINING[relation]).format(**fact.slots)

    def _list(self, most: int) -> tuple[Question, str]:
        rng = self._random
        relation = rng.choice(_LIST_RELATIONS)
        facts = rng.sample(self._by_relation[relation], rng.randint(2, most))
        return list_question(facts), list_text(facts, rng.choice(wordings.LIST_TRAINING))

    def _profile(self, most: int) -> tuple[Question, str]:
        rng = self._random
        pool = self._countries if rng.random() < 0.75 else self._elements
        count = min(most, rng.choices((1, 2, 3, 4, 5), weights=(8, 4, 3, 1, 1))[0])
        names = rng.sample(pool, count)
        return profile_question(names), profile_text(names, rng.choice(wordings.PROFILE_TRAINING))

    def _drill(self, drill: Drill) -> Conversation:
        roll = self._random.random()
        if drill == "copying" or roll < 0.1:
            return self._copying()
        if drill == "listing" or roll < 0.2:
            return self._listing()
        # Sums alone would wipe out the rest within two hundred steps.
        return self._sum() if roll < 0.7 else self._mixed()

    def _sum(self) -> Conversation:
        """A sum, mostly in a whole sentence."""
        rng = self._random
        fact = rng.choice(self._by_relation["arithmetic"])
        question = Question(kind="fact", groups=((fact,),))
        form = rng.choices(("plain", "short", "german"), weights=(0.6, 0.2, 0.2))[0]
        text = rng.choice(wordings.TRAINING["arithmetic"]).format(**fact.slots)
        ending = "" if form == "plain" else f" {self._instruction(form)}"
        return [_user(f"{text}{ending}"), _assistant(answer(question, form))]

    def _copying(self) -> Conversation:
        """Digits or names given back as they came."""
        rng = self._random
        if rng.random() < 0.3:
            text = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 24)))
        else:
            text = " ".join(self._names(3, 12))
        return [_user(f"Repeat: {text}"), _assistant(text)]

    def _listing(self) -> Conversation:
        """Names given back as an enumeration or a list."""
        rng = self._random
        names = self._names(1, 8)
        if rng.random() < 0.5:
            wording, text = rng.choice(wordings.REPEAT), f"{join(names)}."
        else:
            wording, text = rng.choice(wordings.REPEAT_LINES), "\n".join(f"- {name}" for name in names)
        return [*self._default_system(), _user(wording.format(names=join(names))), _assistant(text)]

    def _names(self, least: int, most: int) -> list[str]:
        rng = self._random
        facts = [
            rng.choice(self._by_relation[rng.choice(list(RELATION_WEIGHTS))]) for _ in range(rng.randint(least, most))
        ]
        return [rng.choice((fact.subject, fact.answer, fact.german_subject, fact.german_answer)) for fact in facts]

    def _german_question(self) -> Conversation:
        rng = self._random
        relations = [relation for relation in RELATION_WEIGHTS if relation in wordings.GERMAN_TRAINING]
        weights = [RELATION_WEIGHTS[relation] for relation in relations]
        fact = rng.choice(self._by_relation[rng.choices(relations, weights=weights)[0]])
        text = rng.choice(wordings.GERMAN_TRAINING[fact.relation]).format(**fact.slots)
        question = Question(kind="fact", groups=((fact,),))
        return [*self._default_system(), _user(text), _assistant(answer(question, "german"))]

    def _instruction(self, form: str) -> str:
        return self._random.choice(wordings.INSTRUCTIONS[form])

    def _default_system(self) -> Conversation:
        return [_system(wordings.DEFAULT_SYSTEM)] if self._random.random() < 0.2 else []


def list_question(facts: Sequence[Fact]) -> Question:
    """One relation of several subjects."""
    return Question(kind="list", groups=tuple((fact,) for fact in facts))


def list_text(facts: Sequence[Fact], wording: str) -> str:
    """The wording filled in."""
    nps = f"{wordings.PLURALS[facts[0].relation]} {join([fact.slots['s'] for fact in facts])}"
    return wording.format(nps=nps)


def profile_question(names: Sequence[str]) -> Question:
    """Everything about the named subjects."""
    return Question(kind="profile", groups=tuple(knowledge.profiles()[name] for name in names))


def profile_text(names: Sequence[str], wording: str) -> str:
    """The wording filled in."""
    return wording.format(names=join([knowledge.profiles()[name][0].slots["s"] for name in names]))


def check_no_held_out(conversations: Iterable[Conversation]) -> int:
    """Prove that no user turn contains a held-out wording.

    Returns:
        User turns read.

    Raises:
        HeldOutLeak: The first turn that contains one.
    """
    pattern = wordings.held_out_pattern()
    turns = 0
    for messages in conversations:
        for message in messages:
            if message["role"] == "user":
                turns += 1
                found = pattern.search(message["content"])
                if found:
                    raise HeldOutLeak(f"{found.group()!r} is a held-out wording, found in {message['content']!r}")
    return turns


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


assert set(_FORM_WEIGHTS) == set(FORMS)
