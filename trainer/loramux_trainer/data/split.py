"""Unicode form, exact duplicates, and a split that keeps what belongs together on one side."""

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from loramux_trainer.data.conversation import Conversation, Message
from loramux_trainer.errors import ConfigError

Normal = Literal["none", "nfc", "nfkc"]


def normalized(conversations: Iterable[Conversation], form: Normal) -> list[Conversation]:
    """The same conversations with their text in a Unicode form."""
    if form == "none":
        return list(conversations)
    name: Literal["NFC", "NFKC"] = "NFC" if form == "nfc" else "NFKC"
    return [
        dataclasses.replace(
            conversation,
            messages=tuple(
                Message(role=message.role, content=unicodedata.normalize(name, message.content))
                for message in conversation.messages
            ),
        )
        for conversation in conversations
    ]


def with_default_system(conversations: Iterable[Conversation], system: str | None) -> list[Conversation]:
    """Put a system message before conversations that have none; None changes nothing."""
    return [
        conversation
        if system is None or conversation.messages[0].role == "system"
        else dataclasses.replace(
            conversation, messages=(Message(role="system", content=system), *conversation.messages)
        )
        for conversation in conversations
    ]


def content_key(conversation: Conversation) -> str:
    """SHA-256 that exact duplicates share: roles and text, in NFKC, runs of white space as one space."""
    return _digest([[message.role, _folded(message.content)] for message in conversation.messages])


def group_key(conversation: Conversation) -> str:
    """SHA-256 that conversations share which the split must not part: the named group, or equal user turns."""
    if conversation.group is not None:
        return _digest(["group", conversation.group])
    return _digest([_folded(message.content).casefold() for message in conversation.messages if message.role == "user"])


def unique(conversations: Sequence[Conversation], seen: Iterable[str] = ()) -> list[Conversation]:
    """The first of each set of exact duplicates.

    Args:
        conversations: In order.
        seen: Keys (`content_key`) that count as there already.
    """
    known = set(seen)
    result = []
    for conversation in conversations:
        key = content_key(conversation)
        if key not in known:
            known.add(key)
            result.append(conversation)
    return result


def split(
    conversations: Sequence[Conversation], *, share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Cut into training and validation by groups.

    Which groups are held out depends on their content and the seed alone, not on the order of the file.

    Args:
        conversations: Without duplicates.
        share: Of the conversations that are held out, at least one group; 0 = none.
        seed: Of the choice.

    Raises:
        ConfigError: There is one group only, so that one side would be empty.
    """
    if share == 0:
        return list(conversations), []
    groups: dict[str, list[int]] = {}
    for index, conversation in enumerate(conversations):
        groups.setdefault(group_key(conversation), []).append(index)
    if len(groups) < 2:
        raise ConfigError(
            f"data.validation_share is {share}, but the data has {len(groups)} group that can be held out; give more "
            "data, data.validation, or validation_share: 0"
        )
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}|{key}".encode()).digest())
    wanted = share * len(conversations)
    held: set[int] = set()
    for key in order[:-1]:
        if held and len(held) + len(groups[key]) / 2 > wanted:
            break
        held.update(groups[key])
    train = [conversation for index, conversation in enumerate(conversations) if index not in held]
    return train, [conversation for index, conversation in enumerate(conversations) if index in held]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8")).hexdigest()
