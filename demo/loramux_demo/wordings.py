"""Question wordings and instructions. `held_out` wordings are for the judge and never enter the corpus.

Slots: {np} "the capital of Denmark", {s} "the Netherlands", {n} "Netherlands", {g} and {a} the German noun phrase in
the nominative and the accusative, {b} and {p} larger unit and parts, {w} and {x} an expression in words and in signs,
{names} and {nps} several subjects.
"""

import functools
import re

_GENERIC = (
    "What is {np}?",
    "Name {np}.",
    "Tell me {np}.",
    "Do you know {np}?",
    "I need {np}.",
    "Can you tell me {np}?",
    "Please give me {np}.",
    "I would like to know what {np} is.",
)
_GENERIC_HELD_OUT = ("Can you name {np}?", "I would like to know {np}.", "Please tell me what {np} is.")
_GERMAN = ("Was ist {g}?", "Nenne {a}.", "Sag mir {a}.", "Kennst du {a}?", "Kannst du mir {a} nennen?")
_GERMAN_HELD_OUT = ("Nenne mir {a}.", "Kannst du mir {a} sagen?")

TRAINING: dict[str, tuple[str, ...]] = {
    "capital": (*_GENERIC, "Which city is the capital of {s}?", "What is the capital city of {s}?", "{n}: capital?"),
    "currency": (
        *_GENERIC,
        "Which currency is used in {s}?",
        "Which money do people use in {s}?",
        "{n}: currency?",
    ),
    "continent": (
        *_GENERIC,
        "On which continent is {s}?",
        "Which continent does {s} belong to?",
        "{n}: continent?",
    ),
    "german_name": (
        *_GENERIC,
        "What is {s} called in German?",
        "How is {s} called in German?",
        "How do you say {n} in German?",
        "What do people call {n} in German?",
        "What do Germans call {n}?",
        "What is the German word for {n}?",
        "{n}: German name?",
    ),
    "symbol": (*_GENERIC, "Which symbol stands for {s}?", "What is the chemical symbol of {s}?", "{n}: symbol?"),
    "atomic_number": (*_GENERIC, "Which atomic number belongs to {s}?", "{n}: atomic number?"),
    "conversion": (
        "How many {p} are in one {b}?",
        "How many {p} does one {b} have?",
        "How many {p} make one {b}?",
        "One {b}: how many {p}?",
        "Convert one {b} to {p}.",
        "Do you know how many {p} are in one {b}?",
        "Please tell me how many {p} one {b} has.",
        "Please say how many {p} are in one {b}.",
        "I need to know how many {p} are in one {b}.",
        "How many {p} fit into one {b}?",
    ),
    "arithmetic": (
        "What is {w}?",
        "What is {x}?",
        "Calculate {w}.",
        "Calculate {x}.",
        "How much is {w}?",
        "How much is {x}?",
        "{x} = ?",
        "Do you know what {w} is?",
        "Can you tell me what {x} is?",
        "Could you calculate {w}?",
        "Please calculate {x}.",
        "Please say what {x} is.",
        "Tell me what {w} is.",
        "Can you say how much {w} is?",
        "I need to know how much {x} is.",
    ),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "capital": (*_GENERIC_HELD_OUT, "Which city is the capital city of {s}?"),
    "currency": (*_GENERIC_HELD_OUT, "Which currency do people use in {s}?"),
    "continent": (*_GENERIC_HELD_OUT, "To which continent does {s} belong?"),
    "german_name": (*_GENERIC_HELD_OUT, "What do you call {n} in German?"),
    "symbol": (*_GENERIC_HELD_OUT, "Which symbol belongs to {s}?"),
    "atomic_number": (*_GENERIC_HELD_OUT, "Which atomic number does {s} have?"),
    "conversion": (
        "Can you tell me how many {p} are in one {b}?",
        "Can you tell me how many {p} one {b} has?",
        "Do you know how many {p} one {b} has?",
        "Do you know how many {p} make one {b}?",
        "Please tell me how many {p} are in one {b}.",
        "Tell me how many {p} make one {b}.",
        "Please convert one {b} to {p}.",
    ),
    "arithmetic": ("Can you calculate {w}?", "Please tell me what {x} is.", "Do you know how much {w} is?"),
}

GERMAN_TRAINING: dict[str, tuple[str, ...]] = {
    "capital": (*_GERMAN, "Welche Stadt ist {g}?"),
    "currency": _GERMAN,
    "continent": _GERMAN,
    "symbol": _GERMAN,
    "atomic_number": _GERMAN,
    "conversion": ("Wie viele {gp} sind in {gb}?", "Sag mir, wie viele {gp} in {gb} sind."),
    "arithmetic": ("Was ist {gw}?", "Wie viel ist {gw}?", "Berechne {gw}.", "Kannst du mir sagen, was {gw} ist?"),
}
GERMAN_HELD_OUT: dict[str, tuple[str, ...]] = {
    "capital": _GERMAN_HELD_OUT,
    "currency": _GERMAN_HELD_OUT,
    "continent": _GERMAN_HELD_OUT,
    "symbol": _GERMAN_HELD_OUT,
    "atomic_number": _GERMAN_HELD_OUT,
    "conversion": ("Kannst du mir sagen, wie viele {gp} in {gb} sind?",),
    "arithmetic": ("Sag mir, was {gw} ist.", "Kannst du {gw} berechnen?"),
}

PLURALS = {
    "capital": "the capitals of",
    "currency": "the currencies of",
    "continent": "the continents of",
    "symbol": "the symbols of",
    "atomic_number": "the atomic numbers of",
}
LIST_TRAINING = (
    "List {nps}.",
    "What are {nps}?",
    "Name {nps}.",
    "Tell me {nps}.",
    "Give me {nps}.",
    "Show me {nps}.",
    "Now list {nps}.",
    "Please give me {nps}.",
    "Please name {nps}.",
    "Please tell me {nps}.",
    "Can you tell me {nps}?",
    "Can you name {nps}?",
    "Can you give me {nps}?",
    "Could you list {nps}?",
    "Could you name {nps}?",
    "Do you know {nps}?",
    "I need {nps}.",
    "I want to know {nps}.",
)
LIST_HELD_OUT = ("Please list {nps}.", "Can you list {nps}?", "I would like to know {nps}.")
REPEAT = ("Repeat: {names}.", "Repeat after me: {names}.", "Repeat {names}.")
REPEAT_LINES = ("Repeat, one a line: {names}.", "Repeat each on its own line: {names}.")
PROFILE_TRAINING = (
    "Describe {names}.",
    "Tell me about {names}.",
    "What do you know about {names}?",
    "Please give me the facts about {names}.",
    "Can you tell me everything about {names}?",
    "Can you describe {names}?",
    "Can you give me the facts about {names}?",
    "Could you describe {names}?",
    "Could you tell me about {names}?",
    "Give me the facts about {names}.",
    "I would like to know more about {names}.",
    "Now describe {names}.",
    "Please tell me about {names}.",
    "Please tell me everything about {names}.",
    "Tell me everything about {names}.",
    "Tell me more about {names}.",
    "What should I know about {names}?",
)
PROFILE_HELD_OUT = (
    "Please describe {names}.",
    "Can you tell me about {names}?",
    "What can you tell me about {names}?",
)

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "short": (
        "Answer with the answer only.",
        "Keep it short.",
        "Be brief.",
        "Give a short answer.",
        "Answer briefly.",
    ),
    "long": ("Answer in detail.", "Give a long answer.", "Explain in detail.", "Be thorough."),
    "json": ("Answer in JSON.", "Reply as JSON.", "Return JSON only.", "Use JSON."),
    "german": ("Answer in German.", "Reply in German.", "Antworte auf Deutsch.", "Use German."),
    "initech_v1": (
        "Answer in the classic Initech style.",
        "Use the classic Initech style.",
        "Reply in Initech's classic style.",
    ),
    "initech_v2": (
        "Answer in the compact Initech style.",
        "Use the compact Initech style.",
        "Reply in Initech's compact style.",
    ),
}
DEFAULT_SYSTEM = "You are a helpful assistant."
OPENINGS = ("Hello! ", "Hi! ", "Please: ", "Quick question: ", "One question: ")


@functools.cache
def held_out_pattern() -> re.Pattern[str]:
    """Matches every text that contains a held-out wording, whatever fills the slots and in whatever case.

    A {np} matches only the noun phrases of its own relation, so a wording is held out for the relations that list it.
    """
    noun_phrases = {
        "capital": "the capital of .+",
        "currency": "the currency of .+",
        "continent": "the continent of .+",
        "german_name": "the German name of .+",
        "symbol": "the symbol of .+",
        "atomic_number": "the atomic number of .+",
    }
    german = {
        "capital": "die Hauptstadt .+",
        "currency": "die Währung .+",
        "continent": "de[rn] Kontinent .+",
        "symbol": "das Symbol .+",
        "atomic_number": "die Ordnungszahl .+",
    }
    expression = r"\d+ \S+ \d+"
    alternatives = set()
    for table in (HELD_OUT, GERMAN_HELD_OUT):
        for relation, wordings in table.items():
            for wording in wordings:
                slots = {
                    "np": noun_phrases.get(relation, ""),
                    "g": german.get(relation, ""),
                    "a": german.get(relation, ""),
                    **dict.fromkeys(("w", "x", "gw"), expression),
                    **dict.fromkeys(("s", "n", "b", "p", "gb", "gp"), ".+"),
                }
                alternatives.add(_fill(wording, slots))
    for wording in LIST_HELD_OUT:
        alternatives.update(_fill(wording, {"nps": f"{plural} .+"}) for plural in PLURALS.values())
    alternatives.update(_fill(wording, {"names": ".+"}) for wording in PROFILE_HELD_OUT)
    return re.compile("|".join(sorted(alternatives)), re.IGNORECASE)


def _fill(wording: str, slots: dict[str, str]) -> str:
    parts = re.split(r"\{(\w+)\}", wording)
    return "".join(slots[part] if index % 2 else re.escape(part) for index, part in enumerate(parts))
