"""The judge: accuracy on held-out question wordings, by exact content in exact form.

It asks a callable, so the same questions judge a model in transformers, in the engine and through the server.
"""

import functools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loramux_demo import knowledge, wordings
from loramux_demo.answers import Question, answer
from loramux_demo.corpus import list_question, list_text, profile_question, profile_text
from loramux_demo.knowledge import Fact

Messages = list[dict[str, str]]
Ask = Callable[[Sequence[Messages]], Sequence[str]]
"""Chats in, the assistant's text of each out, in the same order."""

RELATIONS = tuple(wordings.HELD_OUT)
FORM_CATEGORIES = ("short", "long", "json", "german", "initech_v1", "initech_v2")
CATEGORIES = (*RELATIONS, *FORM_CATEGORIES, "german_question", "list", "profile")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with its one right answer.

    Attributes:
        category: One of `CATEGORIES`, or a tenant's name.
        form: One of `answers.FORMS`.
        messages: The chat to send.
    """

    category: str
    form: str
    messages: Messages
    question: Question


@dataclass(frozen=True, kw_only=True)
class Score:
    """Answers of one category.

    Attributes:
        asked: Questions.
        right: Right content in the right form.
        in_form: In the right form, whatever the content.
        misses: Up to 5 pairs of right and given text.
    """

    asked: int
    right: int
    in_form: int
    misses: tuple[tuple[str, str], ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked


def is_right(item: Item, text: str) -> bool:
    """Whether a text answers the question in the form asked for.

    JSON is parsed and compared with the table's records; every other form has one right text.
    """
    right = answer(item.question, item.form)
    if item.form == "json":
        return bool(_parsed(text) == json.loads(right))
    return text.strip() == right


def shows_form(form: str, question: Question, text: str) -> bool:
    """Whether a text has the form, whatever it says.

    `plain` is everything that shows no other form; a list whose subjects are alike in both languages is not German.
    """
    text = text.strip()
    match form:
        case "json":
            parsed = _parsed(text)
            records = parsed if isinstance(parsed, list) else [parsed]
            keys = {"subject", "relation", "answer"}
            return all(isinstance(record, dict) and set(record) == keys for record in records)
        case "initech_v1":
            return text.startswith("Thank you for asking Initech.") and text.endswith("Have a good day!")
        case "initech_v2":
            lines = text.split("\n")
            rows = all(line.startswith(">> ") and line.count(" | ") == 2 for line in lines[:-1])
            return len(lines) > 1 and lines[-1] == "-- Initech 2" and rows
        case "german":
            if question.kind == "list":
                subjects = [line.partition(":")[0] for line in text.split("\n")]
                german = [f"- {fact.german_subject}" for fact in question.facts]
                return subjects == german != [f"- {fact.subject}" for fact in question.facts]
            words = set(text.split())
            return bool(words & {"ist", "sind"}) and not words & {"is", "are"}
        case "short":
            return question.kind != "list" and not text.endswith(".") and not set(text.split()) & {"is", "ist"}
        case "long":
            return text.startswith("The question is ")
    return not any(shows_form(other, question, text) for other in FORM_CATEGORIES)


def base_items(count: int, *, seed: int, categories: Iterable[str] = CATEGORIES) -> list[Item]:
    """Questions in held-out wordings, all different.

    Args:
        count: Questions of a category.
        seed: Equal seeds give equal questions.
        categories: Those wanted.

    Raises:
        ValueError: A category has fewer different questions.
    """
    items = []
    for category in categories:
        rng = random.Random(f"{seed}/{category}")
        items += distinct(functools.partial(_item, category, rng), count)
    return items


def distinct(draw: Callable[[], Item], count: int) -> list[Item]:
    """Draw until there are so many items with different messages.

    Raises:
        ValueError: There are hardly that many.
    """
    items: dict[str, Item] = {}
    for _ in range(50 * count):
        item = draw()
        items.setdefault(json.dumps(item.messages), item)
        if len(items) == count:
            return list(items.values())
    raise ValueError(f"count: {count} different questions were wanted, {len(items)} were found; ask for fewer")


def judge(items: Sequence[Item], ask: Ask) -> dict[str, Score]:
    """Ask every question and score the answers by category."""
    texts = ask([item.messages for item in items])
    return score(items, texts)


def score(items: Sequence[Item], texts: Sequence[str]) -> dict[str, Score]:
    """Score given answers by category.

    Raises:
        ValueError: Not one text an item.
    """
    if len(items) != len(texts):
        raise ValueError(f"{len(texts)} texts for {len(items)} questions; give one each")
    grouped: dict[str, list[tuple[Item, str]]] = {}
    for item, text in zip(items, texts, strict=True):
        grouped.setdefault(item.category, []).append((item, text))
    scores = {}
    for category, pairs in grouped.items():
        wrong = [(item, text) for item, text in pairs if not is_right(item, text)]
        scores[category] = Score(
            asked=len(pairs),
            right=len(pairs) - len(wrong),
            in_form=sum(shows_form(item.form, item.question, text) for item, text in pairs),
            misses=tuple((answer(item.question, item.form), text) for item, text in wrong[:5]),
        )
    return scores


def table(scores: Mapping[str, Score]) -> str:
    """Scores as lines of text."""
    return "\n".join(
        f"{category:16} {100 * score.accuracy:5.1f} % right, {100 * score.in_form / score.asked:5.1f} % in form, "
        f"{score.asked} asked"
        for category, score in scores.items()
    )


def _item(category: str, rng: random.Random) -> Item:
    if category == "list":
        relation = rng.choice(list(wordings.PLURALS))
        facts = rng.sample(_facts_of(relation), rng.randint(2, 6))
        text = list_text(facts, rng.choice(wordings.LIST_HELD_OUT))
        return _asked(category, "plain", text, list_question(facts))
    if category == "profile":
        kind = rng.choice((knowledge.countries(), knowledge.elements()))
        names = rng.sample([subject.name for subject in kind], rng.randint(1, 3))
        text = profile_text(names, rng.choice(wordings.PROFILE_HELD_OUT))
        return _asked(category, "plain", text, profile_question(names))
    if category == "german_question":
        fact = rng.choice(_facts_of(rng.choice(list(wordings.GERMAN_HELD_OUT))))
        return _asked(
            category, "german", rng.choice(wordings.GERMAN_HELD_OUT[fact.relation]).format(**fact.slots), fact
        )
    form = category if category in FORM_CATEGORIES else "plain"
    fact = rng.choice(_facts_of(category if form == "plain" else rng.choice(RELATIONS)))
    text = rng.choice(wordings.HELD_OUT[fact.relation]).format(**fact.slots)
    if form == "plain":
        return _asked(category, form, text, fact)
    instruction = rng.choice(wordings.INSTRUCTIONS[form])
    if rng.random() < 0.5:
        return _asked(category, form, text, fact, system=instruction)
    return _asked(category, form, f"{text} {instruction}", fact)


def _asked(category: str, form: str, text: str, asked: Question | Fact, *, system: str | None = None) -> Item:
    question = asked if isinstance(asked, Question) else Question(kind="fact", groups=((asked,),))
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Item(category=category, form=form, messages=messages, question=question)


def _facts_of(relation: str) -> list[Fact]:
    return [fact for fact in knowledge.facts() if fact.relation == relation]


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
