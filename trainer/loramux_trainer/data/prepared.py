"""The whole way from files to training and validation sequences, with a report of what happened on it."""

import dataclasses
import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from loramux_trainer.config import DataConfig
from loramux_trainer.data.codec import Codec, EncodingError, Sequence
from loramux_trainer.data.conversation import Conversation
from loramux_trainer.data.files import read_conversations
from loramux_trainer.data.split import content_key, normalized, split, unique, with_default_system
from loramux_trainer.errors import ConfigError, DataError, Problem

MAX_LISTED = 1000
"""Conversations that a report lists one by one; it counts the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Sequences that can be trained on.

    Attributes:
        train: For training.
        validation: Held out; empty = no evaluation.
        report: What was read, left out and counted; plain JSON data, the same for the same files and settings.
    """

    train: tuple[Sequence, ...]
    validation: tuple[Sequence, ...]
    report: dict[str, Any]


def prepare(config: DataConfig, codec: Codec, *, seed: int, max_length: int) -> PreparedData:
    """Read, check, normalize, drop duplicates, split and encode. Writes nothing.

    Args:
        config: Which data.
        codec: Of the base.
        seed: Of the split.
        max_length: Longest sequence, tokens.

    Raises:
        DataError: Every problem with file, line and reason.
        ConfigError: The data cannot be split as asked.
    """
    if config.default_system is not None and (token := codec.special_in(config.default_system)):
        raise ConfigError(f"data.default_system: contains the special token {token}; remove it from the text")
    given, validation = _read_all((config.train, config.validation), config)
    train = unique(given)
    report: dict[str, Any] = {
        "files": [_described(file) for file in (*config.train, *config.validation)],
        "conversations": len(given),
        "duplicates": len(given) - len(train),
    }
    if config.validation:
        validation = unique(validation)
        kept = unique(train, [content_key(conversation) for conversation in validation])
        report["also_in_validation"] = len(train) - len(kept)
        if not kept:
            raise ConfigError("data.train: all of its conversations are also in data.validation; give others")
        train = kept
    # Before the split: what is too long is on neither side of it.
    encoded, too_long = _encode(train, config, codec, max_length)
    held, held_too_long = _encode(validation, config, codec, max_length)
    if not config.validation:
        sides = split(list(encoded), share=config.validation_share, seed=seed)
        encoded, held = ({conversation: encoded[conversation] for conversation in side} for side in sides)
    report |= {"seed": seed, "max_length": max_length}
    report |= {"train": _report(encoded, too_long), "validation": _report(held, held_too_long)}
    return PreparedData(train=_flat(encoded), validation=_flat(held), report=report)


def encode_files(files: SequenceOf[Path], config: DataConfig, codec: Codec, *, max_length: int) -> tuple[Sequence, ...]:
    """All conversations of files as sequences, for evaluation.

    Raises:
        DataError: Every problem with file, line and reason.
    """
    (found,) = _read_all((files,), config)
    return _flat(_encode(unique(found), config, codec, max_length)[0])


def _read_all(parts: SequenceOf[SequenceOf[Path]], config: DataConfig) -> list[list[Conversation]]:
    """Conversations of each part; the problems of all parts are raised together."""
    found: list[list[Conversation]] = []
    problems: list[Problem] = []
    for files in parts:
        try:
            read = read_conversations(files, shape=config.format, group_key=config.group_key)
        except DataError as error:
            problems.extend(error.problems)
        else:
            found.append(normalized(with_default_system(read, config.default_system), config.normalize))
    if problems:
        raise DataError(problems)
    return found


def _encode(
    conversations: SequenceOf[Conversation], config: DataConfig, codec: Codec, max_length: int
) -> tuple[dict[Conversation, list[Sequence]], list[Problem]]:
    """Sequences of each conversation, and the conversations that are too long.

    Raises:
        DataError: One cannot be encoded, all are too long, or one is and that is an error.
    """
    kept: dict[Conversation, list[Sequence]] = {}
    problems: list[Problem] = []
    too_long: list[Problem] = []
    for index, conversation in enumerate(conversations):
        try:
            sequences = codec.sequences(conversation, index)
        except EncodingError as error:
            problems.append(Problem(file=conversation.file, line=conversation.line, reason=str(error)))
            continue
        longest = max(len(sequence.input_ids) for sequence in sequences)
        if longest > max_length:
            reason = f"too long: {longest} tokens, at most {max_length} are taken (data.max_length)"
            too_long.append(Problem(file=conversation.file, line=conversation.line, reason=reason))
        else:
            kept[conversation] = sequences
    if too_long and (config.too_long == "error" or len(too_long) == len(conversations)):
        problems.extend(too_long)
    if problems:
        raise DataError(problems)
    return kept, too_long


def _flat(encoded: Mapping[Conversation, SequenceOf[Sequence]]) -> tuple[Sequence, ...]:
    return tuple(sequence for sequences in encoded.values() for sequence in sequences)


def _report(encoded: Mapping[Conversation, SequenceOf[Sequence]], too_long: SequenceOf[Problem]) -> dict[str, Any]:
    sequences = _flat(encoded)
    return {
        "conversations": len(encoded),
        "sequences": len(sequences),
        "tokens": sum(len(sequence.input_ids) for sequence in sequences),
        "loss_tokens": sum(sequence.loss_tokens for sequence in sequences),
        "longest": max((len(sequence.input_ids) for sequence in sequences), default=0),
        "too_long": len(too_long),
        "too_long_places": [f"{item.file.name}:{item.line}: {item.reason}" for item in too_long[:MAX_LISTED]],
    }


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"name": file.name, "bytes": stream.tell(), "sha256": digest}
