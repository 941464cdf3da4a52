"""Reads records with their line numbers out of JSONL and JSON files."""

import json
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loramux_trainer.data.conversation import Conversation, RecordError, parse_messages, shown
from loramux_trainer.errors import DataError, Problem

SUFFIXES = (".jsonl", ".ndjson", ".json")
_BOM = "\ufeff"
_MAX_DIGITS = 1000


def read_conversations(files: Sequence[Path], *, shape: str, group_key: str | None) -> list[Conversation]:
    """Read all conversations of all files.

    Args:
        files: JSONL (a record a line) or JSON (a list of records).
        shape: One of `conversation.SHAPES`, or `auto`.
        group_key: Top-level field that names a record's group; every record must have it.

    Raises:
        DataError: All problems of all files.
    """
    problems: list[Problem] = []
    found: list[Conversation] = []
    for file in files:
        before = len(found) + len(problems)
        for line, record, reason in _records(file):
            try:
                if reason:
                    raise RecordError(reason)
                found.append(
                    Conversation(
                        messages=parse_messages(record, shape), file=file, line=line, group=_group(record, group_key)
                    )
                )
            except RecordError as error:
                problems.append(Problem(file=file, line=line, reason=str(error)))
        if len(found) + len(problems) == before:
            problems.append(Problem(file=file, line=0, reason="holds no conversation"))
    if problems:
        raise DataError(problems)
    return found


def _group(record: Any, key: str | None) -> str | None:
    if key is None:
        return None
    value = record.get(key)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise RecordError(f"group_key '{key}' must be there as text or a whole number")
    return str(value)


def _records(file: Path) -> Iterator[tuple[int, Any, str]]:
    """Line, record and what is wrong with it (empty: nothing)."""
    if file.suffix.lower() not in SUFFIXES:
        yield 0, None, f"is no {' or '.join(SUFFIXES)} file; convert it"
        return
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe or a device may never end
            yield 0, None, "is no regular file; write the conversations into one"
            return
        if file.suffix.lower() == ".json":
            yield from _array(file)
        else:
            yield from _lines(file)
    except OSError as error:
        yield 0, None, f"cannot be read ({error.strerror or error})"


def _lines(file: Path) -> Iterator[tuple[int, Any, str]]:
    with file.open("rb") as stream:
        for number, data in enumerate(stream, start=1):
            try:
                text = data.decode("utf-8").rstrip("\r\n").removeprefix(_BOM if number == 1 else "")
            except UnicodeDecodeError as error:
                yield number, None, f"is not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
                continue
            if not text.strip():
                continue
            try:
                yield number, json.loads(text, **_HOOKS), ""
            except (RecursionError, ValueError) as error:
                yield number, None, _reason(error)


def _array(file: Path) -> Iterator[tuple[int, Any, str]]:
    """Records of a JSON list one by one, so that each has the line on which it begins."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        yield line, None, f"is not UTF-8 ({error.reason} at byte {column} of the line)"
        return
    decoder = json.JSONDecoder(**_HOOKS)
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        yield 1, None, "a .json file must hold a list of conversations; name it .jsonl if it has one a line"
        return
    at = _skip(text, at + 1)
    line, counted = 1, 0
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            record, at = decoder.raw_decode(text, at)
        except (RecursionError, ValueError) as error:
            yield getattr(error, "lineno", line), None, _reason(error)
            return
        yield line, record, ""
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                yield text.count("\n", 0, at) + 1, None, "bad JSON: a comma with no conversation behind it"
                return
        elif text[at : at + 1] != "]":
            yield text.count("\n", 0, at) + 1, None, "bad JSON: expected ',' or ']' after a conversation"
            return
    if text[at + 1 :].strip():
        yield text.count("\n", 0, at) + 1, None, "bad JSON: text after the list"


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {shown(key)} is there twice")
        result[key] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, at most {_MAX_DIGITS} are taken")
    return int(digits)


def _reason(error: Exception) -> str:
    """What a parser's error says, in our words."""
    if isinstance(error, RecursionError):
        return "bad JSON: lists or objects are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"bad JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return f"bad JSON: {error}"


_HOOKS: dict[str, Any] = {"parse_constant": _refuse, "parse_int": _integer, "object_pairs_hook": _unique}
"""What makes the parser strict."""
