"""The whole way from files to training and validation sequences, with a report of what happened on it."""

import dataclasses
import hashlib
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

from loramux_trainer.config import DataConfig
from loramux_trainer.data.codec import Codec, EncodingError, Sequence
from loramux_trainer.data.conversation import Conversation
from loramux_trainer.data.files import read_conversations
from loramux_trainer.data.split import content_key, normalized, split, unique, with_default_system
from loramux_trainer.errors import DataError, Problem

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
    read = _read(config.train, config)
    train = unique(read)
    report: dict[str, Any] = {
        "files": [_described(file) for file in (*config.train, *config.validation)],
        "conversations": len(read),
        "duplicates": len(read) - len(train),
    }
    if config.validation:
        validation = unique(_read(config.validation, config))
        kept = unique(train, [content_key(conversation) for conversation in validation])
        report["also_in_validation"] = len(train) - len(kept)
        train = kept
    else:
        train, validation = split(train, share=config.validation_share, seed=seed)
    report |= {"seed": seed, "max_length": max_length}
    report["train"], sequences = _encode(train, config, codec, max_length)
    report["validation"], held = _encode(validation, config, codec, max_length)
    return PreparedData(train=sequences, validation=held, report=report)


def encode_files(files: SequenceOf[Path], config: DataConfig, codec: Codec, *, max_length: int) -> tuple[Sequence, ...]:
    """All conversations of files as sequences, for evaluation.

    Raises:
        DataError: Every problem with file, line and reason.
    """
    return _encode(unique(_read(files, config)), config, codec, max_length)[1]


def _read(files: SequenceOf[Path], config: DataConfig) -> list[Conversation]:
    found = read_conversations(files, shape=config.format, group_key=config.group_key)
    return normalized(with_default_system(found, config.default_system), config.normalize)


def _encode(
    conversations: SequenceOf[Conversation], config: DataConfig, codec: Codec, max_length: int
) -> tuple[dict[str, Any], tuple[Sequence, ...]]:
    kept: list[Sequence] = []
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
            kept.extend(sequences)
    if too_long and (config.too_long == "error" or len(too_long) == len(conversations)):
        problems.extend(too_long)
    if problems:
        raise DataError(problems)
    loss_tokens = sum(sequence.loss_tokens for sequence in kept)
    tokens = sum(len(sequence.input_ids) for sequence in kept)
    report = {
        "conversations": len(conversations) - len(too_long),
        "sequences": len(kept),
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "longest": max((len(sequence.input_ids) for sequence in kept), default=0),
        "too_long": len(too_long),
        "too_long_places": [f"{item.file.name}:{item.line}: {item.reason}" for item in too_long[:MAX_LISTED]],
    }
    return report, tuple(kept)


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"name": file.name, "bytes": stream.tell(), "sha256": digest}
