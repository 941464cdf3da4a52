"""What the streams of both clients have in common: phases and views of what has arrived."""

from __future__ import annotations

import enum

from loramux._errors import ClientStateError, LoramuxError
from loramux._events import GenerationFold
from loramux._tracing import CallSpan
from loramux._types import Finished, Started, Usage


class Phase(enum.Enum):
    """Life of a stream."""

    NEW = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()
    LEFT = enum.auto()


class StreamViews:
    """State of a generation's stream."""

    _block = "with"

    def __init__(self, fold: GenerationFold) -> None:
        self._fold = fold
        self._phase = Phase.NEW
        self._failure: LoramuxError | None = None

    def __repr__(self) -> str:
        """Show its phase and what runs; nothing of prompt or output."""
        started = self._fold.started
        name = "" if started is None else f" {started.generation_id}"
        return f"<{type(self).__name__} {self._phase.name.lower()}{name}>"

    @property
    def started(self) -> Started:
        """What runs and where; from the beginning of the block on.

        Raises:
            ClientStateError: The block has not been entered.
        """
        if self._fold.started is None:
            raise ClientStateError("the stream has not started: enter its block first")
        return self._fold.started

    @property
    def finished(self) -> Finished:
        """End of the only sequence; when the loop has ended.

        Raises:
            ClientStateError: It has not ended, or there are several: see `finished_all`.
        """
        if self._fold.sequences != 1:
            raise ClientStateError(f"the stream has {self._fold.sequences} sequences: read finished_all")
        ends = self._fold.finished
        if not ends:
            raise ClientStateError("the sequence has not ended: read the stream to its end first")
        return ends[0]

    @property
    def finished_all(self) -> tuple[Finished, ...]:
        """Ends of the sequences that have ended so far, by index."""
        return self._fold.finished

    @property
    def usage(self) -> Usage:
        """Token counts; when the loop has ended.

        Raises:
            ClientStateError: The stream has not ended.
        """
        if self._fold.usage is None:
            raise ClientStateError("there are no counts yet: read the stream to its end first")
        return self._fold.usage

    def _begin(self) -> None:
        """Enter the block."""
        if self._phase is not Phase.NEW:
            raise ClientStateError("a stream can be entered once; call generate() again")
        self._phase = Phase.OPEN

    def _check_open(self) -> None:
        """Refuse to iterate outside of the block."""
        if self._phase is Phase.NEW:
            raise ClientStateError(
                f"the stream is not open: iterate inside of `{self._block} client.generate(...) as stream:`, "
                "or call result()"
            )
        if self._phase is Phase.LEFT:
            raise ClientStateError("the stream is closed: its block has been left")
        if self._failure is not None:
            raise self._failure

    def _ended(self, failure: LoramuxError | None) -> None:
        """Take the end of the call; raises unless the generation is complete."""
        self._phase = Phase.ENDED
        if not self._fold.complete:
            self._failure = self._fold.failed(failure)
            raise self._failure from None

    def _report(self, span: CallSpan) -> None:
        """Tell the span what is known."""
        started, usage = self._fold.started, self._fold.usage
        if started is not None:
            span.attributes(loramux__generation_id=started.generation_id)
            if started.adapter_version is not None:
                span.attributes(loramux__adapter_version=started.adapter_version)
        if usage is not None:
            span.attributes(
                gen_ai__usage__input_tokens=usage.prompt_tokens, gen_ai__usage__output_tokens=usage.output_tokens
            )
