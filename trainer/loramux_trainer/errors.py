"""Errors of the trainer, by exit status.

```
TrainerError
├── ConfigError      2  a setting, or a base model that cannot be used
├── DataError        2  training data; every problem with file, line and reason
├── OutOfMemory      3  the smallest step does not fit
├── NonFinite        4  loss, gradient or adapter became NaN or infinite
├── GateFailed       5  the adapter is not better than what it was compared with
├── PublishRefused   6  the adapter or the server refused the publication
└── Interrupted  128+n  asked to stop by signal n (SIGHUP 129, Ctrl-C 130, SIGTERM 143); a checkpoint was written
```
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

SHOWN_PROBLEMS = 20
"""Problems that a `DataError` prints; it counts the rest."""


class TrainerError(Exception):
    """Root of the tree; the text names the cause and the way out."""

    exit_code = 1


class ConfigError(TrainerError):
    """A setting, or a base model that cannot be used."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a data file.

    Attributes:
        file: The file.
        line: Line of the record, counted from 1; 0 for the file as a whole.
        reason: What is wrong and the way out.
    """

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        """`file:line: reason`."""
        return f"{self.file}:{self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class DataError(TrainerError):
    """Training data that cannot be used.

    Attributes:
        problems: All of them, in file order.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        """Build the text: a line a problem, at most `SHOWN_PROBLEMS`."""
        lines = [str(problem) for problem in problems[:SHOWN_PROBLEMS]]
        if len(problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(lines))
        self.problems = tuple(problems)


class OutOfMemory(TrainerError):
    """The smallest step does not fit into memory."""

    exit_code = 3


class NonFinite(TrainerError):
    """Loss, gradient or adapter became NaN or infinite."""

    exit_code = 4


class GateFailed(TrainerError):
    """The adapter is not better than what it was compared with."""

    exit_code = 5


class PublishRefused(TrainerError):
    """The adapter must not be published, or the server refused it."""

    exit_code = 6


class Interrupted(TrainerError):
    """The run was asked to stop by a signal; a checkpoint was written."""

    def __init__(self, text: str, signal_number: int) -> None:
        """Take the exit status from the signal, as shells do."""
        super().__init__(text)
        self.exit_code = 128 + signal_number
