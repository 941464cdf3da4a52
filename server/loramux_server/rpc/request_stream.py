"""Events of one request on their way from the engine's socket to the handler that reads them."""

import asyncio
from collections import deque

from loramux_server.engine import messages as wire
from loramux_server.errors import LoramuxServerError

_LOGPROB_BYTES = 16
# So that the text of one event fits a message, whatever the tokens are.
_MAX_MERGED = 4096

RequestEvent = wire.Started | wire.PromptLogprobs | wire.Tokens | wire.SequenceFinished | wire.Done


class RequestStream:
    """Events of one request, in order, for one reader.

    A reader that lags gets tokens of one sequence merged into one event, so a stream holds at most a few events however
    far behind it is; `pending_bytes` says roughly how much text and log-probabilities wait.
    """

    def __init__(self, request_id: str) -> None:
        """Create an empty stream.

        Args:
            request_id: Id that the engine knows.
        """
        self.request_id = request_id
        self.started = False
        self.done = False
        self.pending_bytes = 0
        self._events: deque[RequestEvent] = deque()
        self._tokens: dict[int, wire.Tokens] = {}
        self._error: LoramuxServerError | None = None
        self._wake = asyncio.Event()

    def push(self, event: RequestEvent) -> None:
        """Append an event; tokens of a sequence whose earlier tokens still wait are merged into those."""
        if isinstance(event, wire.Tokens):
            self.pending_bytes += 4 * len(event.token_ids) + _LOGPROB_BYTES * sum(
                1 + len(entry.top) for entry in event.logprobs
            )
            earlier = self._tokens.get(event.index)
            if earlier is not None and len(earlier.token_ids) + len(event.token_ids) <= _MAX_MERGED:
                earlier.token_ids.extend(event.token_ids)
                earlier.logprobs.extend(event.logprobs)
            else:
                self._tokens[event.index] = event
                self._events.append(event)
        else:
            if isinstance(event, wire.PromptLogprobs):
                self.pending_bytes += _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in event.entries)
            elif isinstance(event, wire.Done):
                self.done = True
            self._events.append(event)
        self._wake.set()

    def fail(self, error: LoramuxServerError) -> None:
        """End the stream with an error, after the events that already wait."""
        if self._error is None and not self.done:
            self._error = error
            self.done = True
            self._wake.set()

    async def read(self) -> list[RequestEvent]:
        """Wait for events and take all of them.

        Raises:
            LoramuxServerError: The stream was failed and nothing waits any more.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        taken = list(self._events)
        self._events.clear()
        self._tokens.clear()
        self.pending_bytes = 0
        return taken
