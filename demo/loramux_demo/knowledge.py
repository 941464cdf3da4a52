"""What the demo model knows: tables of checkable facts in English and German.

Capitals, currencies and German names follow the countries' own usage and the names common in German; regions follow
the United Nations' M49 scheme, with the Americas split at the border of Panama and Colombia. Countries with several
capitals, or whose capital or currency is in dispute or in transition, are left out.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources

REGIONS = {
    "EU": ("Europe", "Europa"),
    "AS": ("Asia", "Asien"),
    "AF": ("Africa", "Afrika"),
    "NA": ("North America", "Nordamerika"),
    "SA": ("South America", "Südamerika"),
    "OC": ("Oceania", "Ozeanien"),
}

OPERATIONS = {"plus": "+", "minus": "-", "times": "*"}
_GERMAN_OPERATION = {"plus": "plus", "minus": "minus", "times": "mal"}


@dataclass(frozen=True, kw_only=True)
class Country:
    """A country.

    Attributes:
        name: English name without article.
        article: "the " where English uses it, else "".
        region: Key of `REGIONS`.
        german_of: "von Dänemark", "der Schweiz", ...
    """

    name: str
    article: str
    capital: str
    currency: str
    region: str
    german: str
    german_capital: str
    german_currency: str
    german_of: str


@dataclass(frozen=True, kw_only=True)
class Element:
    """A chemical element."""

    number: int
    symbol: str
    name: str
    german: str


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How many of a smaller unit (plural) are in one of a larger unit.

    Attributes:
        german_one: The larger unit in the dative with its article, "einem Kilometer".
    """

    name: str
    count: int
    parts: str
    german_one: str
    german_parts: str


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One relation of one subject.

    Attributes:
        relation: capital, currency, continent, german_name, symbol, atomic_number, conversion or arithmetic.
        subject: As JSON and lists name it: without article.
        answer: In English; numbers as digits.
        statement: A whole English sentence that holds the answer.
        slots: What question wordings insert.
    """

    relation: str
    subject: str
    answer: str
    statement: str
    german_subject: str
    german_answer: str
    german_statement: str
    slots: dict[str, str] = field(hash=False)


def _rows(name: str) -> Iterator[list[str]]:
    text = (resources.files("loramux_demo") / "tables" / name).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            yield line.split("|")


@functools.cache
def countries() -> tuple[Country, ...]:
    """All countries of the table."""
    found = []
    for name, capital, currency, region, german, german_capital, german_currency, german_of in _rows("countries.psv"):
        bare = name.removeprefix("the ")
        found.append(
            Country(
                name=bare,
                article="the " if name != bare else "",
                capital=capital,
                currency=currency,
                region=region,
                german=german or bare,
                german_capital=german_capital or capital,
                german_currency=german_currency,
                german_of=german_of or f"von {german or bare}",
            )
        )
    return tuple(found)


@functools.cache
def elements() -> tuple[Element, ...]:
    """All chemical elements of the table, by atomic number."""
    return tuple(
        Element(number=int(number), symbol=symbol, name=name, german=german)
        for number, symbol, name, german in _rows("elements.psv")
    )


@functools.cache
def units() -> tuple[Unit, ...]:
    """All conversions of the table."""
    return tuple(
        Unit(name=name, count=int(count), parts=parts, german_one=german_one, german_parts=german_parts)
        for name, count, parts, german_one, german_parts in _rows("units.psv")
    )


def sums() -> Iterator[tuple[int, str, int, int]]:
    """Small arithmetic as (left, operation, right, result): operands and differences from 1 to 9."""
    for left in range(1, 10):
        for right in range(1, 10):
            yield left, "plus", right, left + right
            yield left, "times", right, left * right
            if left > right:
                yield left, "minus", right, left - right


def country_facts(country: Country) -> tuple[Fact, ...]:
    """Capital, continent, currency and German name of a country."""
    english = country.article + country.name
    region, german_region = REGIONS[country.region]

    def fact(relation: str, noun: str, german_noun: str, answer: str, german_answer: str, the: str = "") -> Fact:
        return Fact(
            relation=relation,
            subject=country.name,
            answer=answer,
            statement=f"The {noun} of {english} is {the}{answer}.",
            german_subject=country.german,
            german_answer=german_answer,
            german_statement=f"{german_noun} {country.german_of} ist {german_answer}.",
            slots={
                "s": english,
                "n": country.name,
                "np": f"the {noun} of {english}",
                "g": f"{german_noun[0].lower()}{german_noun[1:]} {country.german_of}",
                "a": f"{german_noun.replace('Der ', 'Den ')[0].lower()}"
                f"{german_noun.replace('Der ', 'Den ')[1:]} {country.german_of}",
            },
        )

    german_name = Fact(
        relation="german_name",
        subject=country.name,
        answer=country.german,
        statement=f"The German name of {english} is {country.german}.",
        german_subject=country.name,
        german_answer=country.german,
        german_statement=f"Der deutsche Name von {country.name} ist {country.german}.",
        slots={"s": english, "n": country.name, "np": f"the German name of {english}"},
    )
    return (
        fact("capital", "capital", "Die Hauptstadt", country.capital, country.german_capital),
        fact("continent", "continent", "Der Kontinent", region, german_region),
        fact("currency", "currency", "Die Währung", country.currency, country.german_currency, "the "),
        german_name,
    )


def element_facts(element: Element) -> tuple[Fact, ...]:
    """Symbol, atomic number and German name of an element."""

    def fact(relation: str, noun: str, german_noun: str, answer: str) -> Fact:
        german = f"{german_noun} von {element.german}"
        return Fact(
            relation=relation,
            subject=element.name,
            answer=answer,
            statement=f"The {noun} of {element.name} is {answer}.",
            german_subject=element.german,
            german_answer=answer,
            german_statement=f"{german} ist {answer}.",
            slots={
                "s": element.name,
                "n": element.name,
                "np": f"the {noun} of {element.name}",
                "g": german[0].lower() + german[1:],
                "a": german[0].lower() + german[1:],
            },
        )

    german_name = Fact(
        relation="german_name",
        subject=element.name,
        answer=element.german,
        statement=f"The German name of {element.name} is {element.german}.",
        german_subject=element.name,
        german_answer=element.german,
        german_statement=f"Der deutsche Name von {element.name} ist {element.german}.",
        slots={"s": element.name, "n": element.name, "np": f"the German name of {element.name}"},
    )
    return (
        fact("symbol", "symbol", "Das Symbol", element.symbol),
        fact("atomic_number", "atomic number", "Die Ordnungszahl", str(element.number)),
        german_name,
    )


def unit_fact(unit: Unit) -> Fact:
    """How many parts one of the unit has."""
    return Fact(
        relation="conversion",
        subject=unit.name,
        answer=str(unit.count),
        statement=f"There are {unit.count} {unit.parts} in one {unit.name}.",
        german_subject=unit.german_one.split(" ", 1)[1],
        german_answer=str(unit.count),
        german_statement=f"In {unit.german_one} sind {unit.count} {unit.german_parts}.",
        slots={"b": unit.name, "p": unit.parts, "gb": unit.german_one, "gp": unit.german_parts},
    )


def arithmetic_fact(left: int, operation: str, right: int, result: int) -> Fact:
    """`left operation right` is `result`."""
    words = f"{left} {operation} {right}"
    german = f"{left} {_GERMAN_OPERATION[operation]} {right}"
    return Fact(
        relation="arithmetic",
        subject=words,
        answer=str(result),
        statement=f"{words} is {result}.",
        german_subject=german,
        german_answer=str(result),
        german_statement=f"{german} ist {result}.",
        slots={"w": words, "x": f"{left} {OPERATIONS[operation]} {right}", "gw": german},
    )


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Every fact."""
    return (
        *(fact for country in countries() for fact in country_facts(country)),
        *(fact for element in elements() for fact in element_facts(element)),
        *(unit_fact(unit) for unit in units()),
        *(arithmetic_fact(*row) for row in sums()),
    )


@functools.cache
def profiles() -> dict[str, tuple[Fact, ...]]:
    """Subject -> its facts, for countries and elements."""
    return {
        **{country.name: country_facts(country) for country in countries()},
        **{element.name: element_facts(element) for element in elements()},
    }
