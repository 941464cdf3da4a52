"""Consoles on standard output and error that outlive their reader: a terminal that closes must not end a run."""

import errno
import io
import sys
from typing import IO, Literal, TextIO, cast

from rich.console import Console

_READER_GONE = frozenset({errno.EIO, errno.EPIPE})
"""A write to a terminal that hung up, and one to a pipe that nobody reads any more."""


class LastingStream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr`, whichever object that is now; what is written once its reader has gone is dropped.

    Args:
        name: Of the stream in `sys`.
    """

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self._name = name

    @property
    def _stream(self) -> TextIO:
        stream = getattr(sys, self._name)
        # A live display puts itself in the stream's place and writes to its console, which is this one.
        found: TextIO = getattr(stream, "rich_proxied_file", stream)
        return found

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed: a plain attribute
        """Encoding of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Descriptor of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, or drop it; other errors of the stream are raised."""
        try:
            self._stream.write(text)
        except OSError as error:
            _check_gone(error)
        return len(text)

    def flush(self) -> None:
        """Flush; errors are those of `write`."""
        try:
            self._stream.flush()
        except OSError as error:
            _check_gone(error)


def _check_gone(error: OSError) -> None:
    if error.errno not in _READER_GONE:
        raise error


def console(name: Literal["stdout", "stderr"]) -> Console:
    """A console on a standard stream."""
    return Console(file=cast("IO[str]", LastingStream(name)), emoji=False)
