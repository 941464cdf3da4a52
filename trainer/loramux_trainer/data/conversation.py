"""One conversation, and the shapes in which files hold it.

| shape | record |
| --- | --- |
| `openai` | `{"messages": [{"role": "system" or "user" or "assistant", "content": "..."}, ...]}` |
| `dialogue` | `{"system": "...", "dialogue": [{"user": "...", "assistant": "..."}, ...]}` |
| `conversation` | `{"system": "...", "conversation": [{"human": "...", "assistant": "..."}, ...]}` |

`system` is optional and never invented. Further top-level fields are metadata and stay out of training.
"""

import dataclasses
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHAPES = {"openai": "messages", "dialogue": "dialogue", "conversation": "conversation"}
"""Shape -> the key that holds its turns."""

_TURN_KEYS = {"dialogue": "user", "conversation": "human"}
_ROLES = ("system", "user", "assistant")
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}
_SHOWN_CHARACTERS = 60


class RecordError(ValueError):
    """A record that is no conversation; the text says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One message.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: Its text, not blank.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """An optional system message, then user and assistant in turns; it ends with the assistant.

    Attributes:
        messages: All messages.
        file: Where it was read.
        line: Line of its record, from 1.
        group: What must stay on one side of a split with it; None = nothing named.
    """

    messages: tuple[Message, ...]
    file: Path
    line: int
    group: str | None = None

    @property
    def place(self) -> str:
        """`file name:line`."""
        return f"{self.file.name}:{self.line}"

    def plain(self) -> list[dict[str, str]]:
        """Messages as the chat template takes them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def shown(value: object) -> str:
    """`repr` for an error message, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def parse_messages(record: Any, shape: str) -> tuple[Message, ...]:
    """Messages of a record.

    Args:
        record: Parsed JSON.
        shape: One of `SHAPES`, or `auto`.

    Raises:
        RecordError: Not of the shape, or no conversation that can be trained on.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"a record must be an object, this is {_kind(record)}")
    if shape == "auto":
        shape = _guess(record)
    key = SHAPES[shape]
    turns = record.get(key)
    if not isinstance(turns, list):
        raise RecordError(f"'{key}' must be a list of turns, it is {_kind(turns)}")
    if not turns:
        raise RecordError(f"'{key}' is empty: no assistant turn to learn from")
    if shape == "openai":
        messages = [_openai(turn, number) for number, turn in enumerate(turns, start=1)]
        if record.get("system") is not None:
            raise RecordError("'system' beside 'messages': put it into the messages as role system")
        if record.get("tools") or record.get("functions"):
            raise RecordError("tools are not trained yet; leave such conversations out")
    else:
        messages = _pairs(record, turns, _TURN_KEYS[shape])
    _check_order(messages)
    return tuple(messages)


def _guess(record: Mapping[str, Any]) -> str:
    found = [shape for shape, key in SHAPES.items() if key in record]
    if len(found) != 1:
        keys = ", ".join(f"'{key}'" for key in SHAPES.values())
        there = "none of them is there" if not found else f"{len(found)} of them are there"
        raise RecordError(f"a conversation has one of {keys}; {there}")
    return found[0]


def _openai(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise RecordError(f"message {number} must be an object, it is {_kind(turn)}")
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise RecordError(f"message {number} has {key}; tools are not trained yet, leave such conversations out")
    role = turn.get("role")
    if role not in _ROLES:
        raise RecordError(f"message {number} has role {shown(role)}; known roles are {', '.join(_ROLES)}")
    if (weight := turn.get("weight", 1)) is not None and weight != 1:
        raise RecordError(
            f"message {number} has weight {shown(weight)}; turns are not weighted yet, leave such conversations out"
        )
    return Message(role=role, content=_text(turn.get("content"), f"message {number} ({role})"))


def _pairs(record: Mapping[str, Any], turns: list[Any], asker: str) -> list[Message]:
    messages = []
    if record.get("system") is not None:
        messages.append(Message(role="system", content=_text(record["system"], "'system'")))
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RecordError(f"turn {number} must be an object, it is {_kind(turn)}")
        if unknown := sorted(str(key) for key in turn if key not in (asker, "assistant")):
            raise RecordError(
                f"turn {number} has the unknown key {shown(unknown[0])}; it takes '{asker}' and 'assistant'"
            )
        for key, role in ((asker, "user"), ("assistant", "assistant")):
            if key not in turn:
                raise RecordError(f"turn {number} has no '{key}'")
            messages.append(Message(role=role, content=_text(turn[key], f"turn {number} ({key})")))
    return messages


def _check_order(messages: list[Message]) -> None:
    if not any(message.role == "assistant" for message in messages):
        raise RecordError("no assistant turn to learn from")
    wanted = "user"
    for number, message in enumerate(messages, start=1):
        if message.role == "system":
            if number > 1:
                raise RecordError(f"wrong role order: message {number} is a system message; it may only come first")
            continue
        if message.role != wanted:
            raise RecordError(f"wrong role order: message {number} is {message.role}, expected {wanted}")
        wanted = "assistant" if wanted == "user" else "user"
    if wanted == "assistant":
        raise RecordError("wrong role order: the conversation ends with a user turn that nobody answers")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} must be text, it is {_kind(value)}")
    if all(unicodedata.category(letter) in _INVISIBLE for letter in value):
        raise RecordError(f"empty turn: {where} has no text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RecordError(f"{where} holds half a surrogate pair, which is no text")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    names = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
