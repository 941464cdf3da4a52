"""Batches of the blocking client."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator

from loramux import _methods as methods
from loramux._batch import FATAL, BatchFold, GroupBuilder, group_size
from loramux._connection import View
from loramux._errors import LoramuxError
from loramux._prompt_types import BatchRequest, Prompt
from loramux._transport import StreamCall, Transport
from loramux._types import BatchItem
from loramux.v1 import generation_pb2 as pb


class _Readers:
    """The calls of a batch, each read by its own thread.

    Args:
        transport: The channel.
        view: Tenant and the like.
        timeout: Seconds a call; None for no limit.
        pin_versions: Whether a call resolves aliases once.
    """

    def __init__(self, transport: Transport, view: View, *, timeout: float | None, pin_versions: bool) -> None:
        self._transport = transport
        self._view = view
        self._timeout = timeout
        self._pin_versions = pin_versions
        # Bounded by the window: an item is answered once.
        self.answers: queue.SimpleQueue[BatchItem | BaseException] = queue.SimpleQueue()
        self._running: list[tuple[StreamCall[pb.BatchGenerateResponse], threading.Thread]] = []

    def start(self, items: list[pb.BatchGenerateItem]) -> None:
        """Send a group."""
        request = pb.BatchGenerateRequest(items=items, pin_versions=self._pin_versions)
        call = StreamCall(self._transport, methods.BATCH_GENERATE, request, self._view, timeout=self._timeout)
        thread = threading.Thread(target=self._read, args=(call, BatchFold(items)), name="loramux-batch", daemon=True)
        self._running = [(open_call, reader) for open_call, reader in self._running if reader.is_alive()]
        self._running.append((call, thread))
        thread.start()

    def _read(self, call: StreamCall[pb.BatchGenerateResponse], fold: BatchFold) -> None:
        """Read a call to its end."""
        cause: LoramuxError | None = None
        try:
            call.open()
            while (response := call.read()) is not None:
                item = fold.apply(response, request_id=call.request_id)
                if item is not None:
                    self.answers.put(item)
        except FATAL as error:
            self.answers.put(error)
            return
        except LoramuxError as error:
            cause = error
        except BaseException as error:  # noqa: BLE001  re-raised in the caller's thread
            self.answers.put(error)
            return
        for item in fold.rest(cause):
            self.answers.put(item)

    def stop(self) -> None:
        """End all calls and wait for their threads."""
        for call, _ in self._running:
            call.cancel()
        for _, thread in self._running:
            thread.join()


def batch_generate(
    transport: Transport,
    view: View,
    requests: Iterable[BatchRequest | Prompt],
    *,
    window: int,
    timeout: float | None,
    pin_versions: bool,
) -> Generator[BatchItem, None, None]:
    """Run requests, at most `window` of them open at a time; see `Client.batch_generate`."""
    size = group_size(window)
    builder = GroupBuilder(size, adapter=view.adapter)
    readers = _Readers(transport, view, timeout=timeout, pin_versions=pin_versions)
    source: Iterator[BatchRequest | Prompt] = iter(requests)
    exhausted = False
    open_items = 0
    try:
        while True:
            while not exhausted and open_items + size <= window:
                while not builder.full:
                    try:
                        request = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    refused = builder.add(request)
                    if refused is not None:
                        yield refused
                open_items += _send(readers, builder)
            if exhausted:
                while builder.items and open_items < window:
                    open_items += _send(readers, builder)
            if not open_items:
                return
            answer = readers.answers.get()
            if isinstance(answer, BaseException):
                raise answer
            open_items -= 1
            builder.answered(answer.item_id)
            yield answer
    finally:
        readers.stop()


def _send(readers: _Readers, builder: GroupBuilder) -> int:
    """Send the waiting group, if there is one; returns its items."""
    items = builder.take()
    if items:
        readers.start(items)
    return len(items)
