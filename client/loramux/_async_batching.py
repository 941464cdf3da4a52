"""Batches of the asyncio client."""

# A timeout here is the deadline of a call, which the server gets too.
# ruff: noqa: ASYNC109
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from loramux import _methods as methods
from loramux._async_transport import AsyncStreamCall, AsyncTransport
from loramux._batch import FATAL, BatchFold, GroupBuilder, group_size
from loramux._connection import View
from loramux._errors import LoramuxError
from loramux._prompt_types import BatchRequest, Prompt
from loramux._types import BatchItem
from loramux.v1 import generation_pb2 as pb

# A source that pauses for longer gets its items sent, full group or not: it may wait for their answers.
LINGER_SECONDS = 0.02


async def _iterate(requests: Iterable[BatchRequest | Prompt]) -> AsyncIterator[BatchRequest | Prompt]:
    """Make a plain iterable asynchronous; a long one lets others run now and then."""
    for index, request in enumerate(requests):
        if index % 64 == 63:
            await asyncio.sleep(0)
        yield request


class _Source:
    """Pulls requests, and remembers a pull that is still under way.

    Args:
        requests: Where they come from.
    """

    def __init__(self, requests: Iterable[BatchRequest | Prompt] | AsyncIterable[BatchRequest | Prompt]) -> None:
        source = requests if isinstance(requests, AsyncIterable) else _iterate(requests)
        self._iterator = aiter(source)
        self._pull: asyncio.Task[BatchRequest | Prompt | None] | None = None

    async def _next(self) -> BatchRequest | Prompt | None:
        """Return the next request; None at the end."""
        return await anext(self._iterator, None)

    async def next(self, *, linger: float | None) -> tuple[bool, BatchRequest | Prompt | None]:
        """Return whether the source answered within `linger` seconds, and its next request (None at the end)."""
        if self._pull is None:
            self._pull = asyncio.create_task(self._next())
        done, _ = await asyncio.wait({self._pull}, timeout=linger)
        if not done:
            return False, None
        pull, self._pull = self._pull, None
        return True, pull.result()

    async def stop(self) -> None:
        """Give up a pull that is under way."""
        if self._pull is not None:
            self._pull.cancel()
            # Whatever it ends with is nobody's business any more; gather takes it.
            await asyncio.gather(self._pull, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Refused:
    """An item that was refused before it was sent."""

    item: BatchItem


class _Job:
    """One batch: a feeder that forms groups, and a reader for each call.

    Args:
        transport: The channel.
        view: Tenant and the like.
        window: Most open items.
        timeout: Seconds a call; None for no limit.
        pin_versions: Whether a call resolves aliases once.
    """

    def __init__(
        self, transport: AsyncTransport, view: View, *, window: int, timeout: float | None, pin_versions: bool
    ) -> None:
        self._transport = transport
        self._view = view
        self._window = window
        self._size = group_size(window)
        self._timeout = timeout
        self._pin_versions = pin_versions
        self._builder = GroupBuilder(self._size, adapter=view.adapter)
        # Bounded by the window: an item is answered once. None says that the source has ended.
        self.answers: asyncio.Queue[BatchItem | _Refused | Exception | None] = asyncio.Queue()
        self.open_items = 0
        self._room = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, source: _Source) -> None:
        """Start to pull."""
        self._spawn(self._feed(source))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task and keep its handle."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def answered(self, answer: BatchItem | _Refused) -> BatchItem:
        """Take an item out of the window."""
        self.open_items -= 1
        self._room.set()
        if isinstance(answer, _Refused):
            return answer.item
        self._builder.answered(answer.item_id)
        return answer

    async def _wait_for_room(self, items: int) -> None:
        """Wait until so many more items may be open."""
        while self.open_items + items > self._window:
            self._room.clear()
            await self._room.wait()

    async def _feed(self, source: _Source) -> None:
        """Pull requests and send them in groups."""
        try:
            exhausted = False
            while not exhausted:
                await self._wait_for_room(self._size)
                while not self._builder.full:
                    answered, request = await source.next(linger=LINGER_SECONDS if self._builder.items else None)
                    if not answered:
                        break
                    if request is None:
                        exhausted = True
                        break
                    refused = self._builder.add(request)
                    if refused is not None:
                        self.open_items += 1
                        self.answers.put_nowait(_Refused(refused))
                        await self._wait_for_room(self._size)
                self._send()
            while self._builder.items:
                await self._wait_for_room(self._builder.items)
                self._send()
            self.answers.put_nowait(None)
        except Exception as error:  # noqa: BLE001  re-raised in the caller's task
            self.answers.put_nowait(error)

    def _send(self) -> None:
        """Send the waiting group, if there is one."""
        items = self._builder.take()
        if items:
            self.open_items += len(items)
            self._spawn(self._read(items))

    async def _read(self, items: list[pb.BatchGenerateItem]) -> None:
        """Make a call and read it to its end."""
        request = pb.BatchGenerateRequest(items=items, pin_versions=self._pin_versions)
        call = AsyncStreamCall(self._transport, methods.BATCH_GENERATE, request, self._view, timeout=self._timeout)
        fold = BatchFold(items)
        cause: LoramuxError | None = None
        try:
            await call.open()
            while (response := await call.read()) is not None:
                item = fold.apply(response, request_id=call.request_id)
                if item is not None:
                    self.answers.put_nowait(item)
        except FATAL as error:
            self.answers.put_nowait(error)
            return
        except LoramuxError as error:
            cause = error
        except Exception as error:  # noqa: BLE001  re-raised in the caller's task
            self.answers.put_nowait(error)
            return
        finally:
            call.cancel()
        for item in fold.rest(cause):
            self.answers.put_nowait(item)

    async def stop(self) -> None:
        """End all calls and wait for their tasks."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def batch_generate(
    transport: AsyncTransport,
    view: View,
    requests: Iterable[BatchRequest | Prompt] | AsyncIterable[BatchRequest | Prompt],
    *,
    window: int,
    timeout: float | None,
    pin_versions: bool,
) -> AsyncGenerator[BatchItem, None]:
    """Run requests, at most `window` of them open at a time; see `AsyncClient.batch_generate`."""
    job = _Job(transport, view, window=window, timeout=timeout, pin_versions=pin_versions)
    source = _Source(requests)
    job.begin(source)
    exhausted = False
    try:
        while not exhausted or job.open_items:
            answer = await job.answers.get()
            if answer is None:
                exhausted = True
            elif isinstance(answer, Exception):
                raise answer
            else:
                yield job.answered(answer)
    finally:
        await job.stop()
        await source.stop()
