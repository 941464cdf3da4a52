"""Training data of the demo's tenants: each turns a form on without an instruction.

Subjects are split by a hash of their name: a tenant's data holds training subjects only, its questions for the judge
the others, in held-out wordings. The base knows the facts about all of them. `python -m loramux_demo.tenants --out DIR`
writes one file of OpenAI messages a tenant.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from loramux_demo import knowledge, wordings
from loramux_demo.answers import Question, answer
from loramux_demo.corpus import Conversation, list_question, list_text, profile_question, profile_text
from loramux_demo.judge import Item, distinct
from loramux_demo.knowledge import Fact

TENANTS = {
    "acme": "json",
    "globex": "german",
    "initech-v1": "initech_v1",
    "initech-v2": "initech_v2",
    "hooli": "short",
}
"""Data set -> form. `hooli` is the newcomer whose adapter the demo trains before the user's eyes."""

_HELD_OUT_SHARE = 0.35


def is_held_out(subject: str) -> bool:
    """Whether a subject (country, element, unit, expression) is kept out of the tenants' training data."""
    digest = hashlib.sha256(subject.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < _HELD_OUT_SHARE


def training_conversations(tenant: str, count: int, *, seed: int) -> list[Conversation]:
    """A tenant's conversations: training wordings, training subjects, its form, no instruction.

    Args:
        tenant: Key of `TENANTS`.
        count: Conversations.
        seed: Equal seeds give equal data.
    """
    form = TENANTS[tenant]
    rng = random.Random(f"{seed}/{tenant}")
    conversations = []
    for _ in range(count):
        question, text = _question(rng, held_out=False)
        conversations.append(
            [{"role": "user", "content": text}, {"role": "assistant", "content": answer(question, form)}]
        )
    return conversations


def judge_items(tenant: str, count: int, *, seed: int) -> list[Item]:
    """Different questions about held-out subjects in held-out wordings, without an instruction; one fact each."""
    rng = random.Random(f"{seed}/{tenant}/judge")

    def draw() -> Item:
        fact = rng.choice(_facts(rng, held_out=True))
        text = rng.choice(wordings.HELD_OUT[fact.relation]).format(**fact.slots)
        return Item(
            category=tenant,
            form=TENANTS[tenant],
            messages=[{"role": "user", "content": text}],
            question=Question(kind="fact", groups=((fact,),)),
        )

    return distinct(draw, count)


def write_jsonl(path: Path, conversations: Sequence[Conversation]) -> None:
    """Write conversations as OpenAI messages, one object a line."""
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m loramux_demo.tenants", description="Write the tenants' data.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the JSONL files, created if missing")
    parser.add_argument("--count", type=int, default=600, help="conversations of a tenant (600)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tenants", nargs="*", choices=list(TENANTS), default=list(TENANTS))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for tenant in options.tenants:
        path = options.out / f"{tenant}.jsonl"
        write_jsonl(path, training_conversations(tenant, options.count, seed=options.seed))
        sys.stdout.write(f"{path}: {options.count} conversations in form {TENANTS[tenant]}\n")
    return 0


def _question(rng: random.Random, *, held_out: bool) -> tuple[Question, str]:
    roll = rng.random()
    if roll < 0.15:
        facts = _facts(rng, held_out=held_out, relations=tuple(wordings.PLURALS))
        chosen = rng.sample(facts, rng.randint(2, 4))
        return list_question(chosen), list_text(chosen, rng.choice(wordings.LIST_TRAINING))
    if roll < 0.3:
        names = [name for name in knowledge.profiles() if is_held_out(name) == held_out]
        chosen_names = rng.sample(names, rng.randint(1, 2))
        return profile_question(chosen_names), profile_text(chosen_names, rng.choice(wordings.PROFILE_TRAINING))
    fact = rng.choice(_facts(rng, held_out=held_out))
    text = rng.choice(wordings.TRAINING[fact.relation]).format(**fact.slots)
    return Question(kind="fact", groups=((fact,),)), text


def _facts(rng: random.Random, *, held_out: bool, relations: Sequence[str] = tuple(wordings.TRAINING)) -> list[Fact]:
    relation = rng.choice(relations)
    return [fact for fact in knowledge.facts() if fact.relation == relation and is_held_out(fact.subject) == held_out]


if __name__ == "__main__":
    raise SystemExit(main())
