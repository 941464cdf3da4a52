"""Streams of the asyncio client."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from loramux._adapter_events import watch_event
from loramux._adapter_types import AdapterEvent
from loramux._async_transport import AsyncStreamCall
from loramux._errors import ClientStateError, LoramuxError, StreamInterrupted
from loramux._events import GenerationFold
from loramux._stream_state import Phase, StreamViews
from loramux._types import Delta, GenerationResult
from loramux.v1 import adapter_pb2, generation_pb2


class AsyncGenerationStream(StreamViews):
    """One generation; nothing is sent before the `async with` block or `result`.

    Iterating gives the pieces of output, `started` is there from the beginning of the block, `finished` and `usage` are
    there when the loop has ended. Leaving the block ends the call on the server. One task reads a stream; `cancel` may
    come from any on the same loop. A cancelled task gets `asyncio.CancelledError`, and the call ends with it.
    """

    _block = "async with"

    def __init__(self, make: Callable[[], AsyncStreamCall[generation_pb2.GenerateResponse]], n: int) -> None:
        super().__init__(GenerationFold(n))
        self._make = make
        self._call: AsyncStreamCall[generation_pb2.GenerateResponse] | None = None
        self._pending: deque[Delta] = deque()

    async def __aenter__(self) -> Self:
        """Send the request and wait until the server has admitted it.

        Raises:
            LoramuxError: It was refused, retries included.
        """
        self._begin()
        try:
            self._call = self._make()
            await self._call.open()
            while self._fold.started is None:
                event = await self._call.read()
                if event is None:
                    raise self._fold.failed(None)
                self._take(event)
        except BaseException:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the call."""
        self._leave()

    def __aiter__(self) -> Self:
        """Return itself.

        Raises:
            ClientStateError: The block has not been entered, or has been left.
        """
        self._check_open()
        return self

    async def __anext__(self) -> Delta:
        """Wait for the next piece of output.

        Raises:
            StreamInterrupted: The stream broke; it has what arrived.
            LoramuxError: The server ended the generation with an error.
        """
        self._check_open()
        assert self._call is not None, "an open stream has a call"
        while not self._pending:
            try:
                event = await self._call.read()
            except LoramuxError as error:
                failure: LoramuxError | None = error
            else:
                if event is not None:
                    self._take(event)
                    continue
                failure = None
            self._ended(failure)
            raise StopAsyncIteration
        return self._pending.popleft()

    async def result(self) -> GenerationResult:
        """Wait for the end and return all of it; outside of a block this makes the call as well.

        Raises:
            StreamInterrupted: The stream broke; it has what arrived.
            LoramuxError: The request was refused or the generation failed.
        """
        if self._fold.complete:
            return self._fold.result()
        if self._phase is Phase.NEW:
            async with self:
                return await self.result()
        async for _ in self:
            pass
        return self._fold.result()

    def cancel(self) -> None:
        """End the call now; a reader gets StreamInterrupted. Before the block it keeps the call from being made."""
        if self._phase is Phase.NEW:
            self._phase = Phase.LEFT
        if self._call is not None:
            self._call.cancel()

    def _take(self, event: generation_pb2.GenerateResponse) -> None:
        """Fold an event; keep a piece of output for the reader."""
        delta = self._fold.apply(event)
        if delta is not None:
            self._pending.append(delta)
        elif self._call is not None:
            self._report(self._call.span)

    def _leave(self) -> None:
        """End the call and close the stream."""
        self._phase = Phase.LEFT
        if self._call is not None:
            self._call.cancel()


class AsyncAdapterWatch:
    """A watch of adapters; nothing is sent before the `async with` block.

    It begins with a snapshot of every adapter. When it breaks, which long connections do now and then, open a new one:
    its snapshot replaces everything known so far.
    """

    def __init__(self, make: Callable[[], AsyncStreamCall[adapter_pb2.WatchAdaptersResponse]]) -> None:
        self._make = make
        self._call: AsyncStreamCall[adapter_pb2.WatchAdaptersResponse] | None = None
        self._phase = Phase.NEW

    async def __aenter__(self) -> Self:
        """Begin the watch.

        Raises:
            LoramuxError: It was refused, retries included.
        """
        if self._phase is not Phase.NEW:
            raise ClientStateError("a watch can be entered once; call watch() again")
        self._phase = Phase.OPEN
        try:
            self._call = self._make()
            await self._call.open()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the watch."""
        self._phase = Phase.LEFT
        self.cancel()

    def __aiter__(self) -> Self:
        """Return itself.

        Raises:
            ClientStateError: The block has not been entered, or has been left.
        """
        if self._phase is not Phase.OPEN:
            raise ClientStateError(
                "a watch is read inside of its block: async with client.adapters.watch() as events: ..."
            )
        return self

    async def __anext__(self) -> AdapterEvent:
        """Wait for the next event.

        Raises:
            StreamInterrupted: The server ended the watch, as it does when it shuts down.
            LoramuxError: The watch failed.
        """
        self.__aiter__()
        assert self._call is not None, "an open watch has a call"
        while True:
            message = await self._call.read()
            if message is None:
                raise StreamInterrupted("the server ended the watch; open a new one")
            event = watch_event(message)
            if event is not None:
                return event

    def cancel(self) -> None:
        """End the watch; a reader gets an error."""
        if self._call is not None:
            self._call.cancel()
