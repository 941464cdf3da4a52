"""BatchGenerate: many requests in one call, each with its own fate.

Items wait in the call. At most `window` of them run; an item enters the queue only while at most half of it is taken,
so a batch leaves room for single requests. A reader that lags fills a small buffer, which pauses running items and
with them the start of further ones; it never ends the call.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Protocol

from loramux.v1 import generation_pb2 as pb
from loramux_server.errors import Expired, Internal, LoramuxServerError, Reason
from loramux_server.lora.engine_link import ResolvedAdapter
from loramux_server.rpc.admission import AdmissionGate, Ticket
from loramux_server.rpc.call import Call
from loramux_server.rpc.generation import Generation
from loramux_server.rpc.limits import Limits
from loramux_server.rpc.status import to_status
from loramux_server.rpc.validate import check_duration, invalid

_log = logging.getLogger(__name__)

_BUFFERED_EVENTS = 64

Run = Callable[[Generation], AsyncGenerator[pb.GenerateResponse, None]]

Pinned = Mapping[tuple[str | None, str], ResolvedAdapter]
"""(Adapter field, split key or "") -> the version for items with them."""


class Pin(Protocol):
    """Binds an adapter field of a tenant to a version now."""

    def __call__(self, tenant: str, adapter: str | None, *, split_key: str, seed: int) -> ResolvedAdapter:
        """Bind; items of one `split_key` get one version, those without a key one that is drawn from `seed`."""
        ...


class Accept(Protocol):
    """`GenerationService.accept`."""

    async def __call__(
        self,
        request: pb.GenerateRequest,
        call: Call,
        *,
        ticket: Ticket,
        pinned: Pinned,
        prefix: str,
        time_limit: float | None,
    ) -> Generation:
        """Accept one request."""
        ...


class BatchGeneration:
    """One BatchGenerate call."""

    def __init__(
        self,
        request: pb.BatchGenerateRequest,
        call: Call,
        *,
        limits: Limits,
        gate: AdmissionGate,
        window: int,
        start: Accept,
        pin: Pin,
    ) -> None:
        """Prepare a batch; nothing runs before `events` is iterated.

        Args:
            request: As received.
            call: The call.
            limits: The server's bounds.
            gate: Bound on waiting requests.
            window: Items that run at once.
            start: Accepts one item.
            pin: Binds an adapter field to a version now.
        """
        self._request = request
        self._call = call
        self._limits = limits
        self._gate = gate
        self._window = window
        self._start = start
        self._pin = pin
        self._pinned: dict[tuple[str | None, str], ResolvedAdapter] = {}
        # One item a turn of the event loop: a window of prompts tokenized in one turn would stop everybody else.
        self._accepting = asyncio.Lock()
        self._items: deque[tuple[int, pb.BatchGenerateItem]] = deque()
        self._buffer: asyncio.Queue[pb.BatchGenerateResponse | None] = asyncio.Queue(_BUFFERED_EVENTS)

    async def events(self, run: Run) -> AsyncGenerator[pb.BatchGenerateResponse, None]:
        """Run the items and yield their events, interleaved.

        Args:
            run: Yields the events of an accepted generation.

        Raises:
            InvalidRequest: The call as a whole is malformed; nothing ran.
        """
        self._items.extend(_checked(self._request, self._limits))
        if self._request.pin_versions:
            self._pin_all()
        workers = [asyncio.create_task(self._work(run)) for _ in range(min(self._window, len(self._items)))]
        closer = asyncio.create_task(self._close_after(workers))
        try:
            while (response := await self._buffer.get()) is not None:
                yield response
            await asyncio.gather(closer, *workers)
        finally:
            for task in (closer, *workers):
                task.cancel()
            await asyncio.gather(closer, *workers, return_exceptions=True)

    def _pin_all(self) -> None:
        seed = secrets.randbits(64)
        requests = (item.request for _, item in self._items)
        pairs = {(each.adapter if each.HasField("adapter") else None, each.sampling.split_key) for each in requests}
        for adapter, split_key in pairs:
            try:
                self._pinned[adapter, split_key] = self._pin(self._call.tenant, adapter, split_key=split_key, seed=seed)
            except LoramuxServerError as error:
                # Not a failure of the call: each item that names this adapter meets the same error by itself.
                _log.debug("cannot pin an adapter of a batch: %s", error.reason)

    async def _close_after(self, workers: list[asyncio.Task[None]]) -> None:
        await asyncio.wait(workers)
        await self._buffer.put(None)

    async def _work(self, run: Run) -> None:
        while self._items:
            position, item = self._items.popleft()
            error: LoramuxServerError | None = None
            try:
                await self._run_item(position, item, run)
            except LoramuxServerError as domain_error:
                error = domain_error
            except Exception as bug:  # noqa: BLE001 - converted: INTERNAL for the item, the stack for the log
                _log.exception("unexpected %s in a batch item", type(bug).__name__)
                error = Internal(
                    Reason.INTERNAL,
                    f"internal error; the server's log has it under correlation id {self._call.correlation_id}",
                )
            if error is not None:
                await self._buffer.put(pb.BatchGenerateResponse(item_id=item.item_id, status=to_status(error)))

    async def _run_item(self, position: int, item: pb.BatchGenerateItem, run: Run) -> None:
        prefix = f"items[{position}].request."
        timeout = _timeout(position, item)
        ticket = await self._gate.enter_when_calm()
        try:
            async with asyncio.timeout(timeout):
                async with self._accepting:
                    generation = await self._start(
                        item.request,
                        self._call,
                        ticket=ticket,
                        pinned=self._pinned,
                        prefix=prefix,
                        time_limit=timeout,
                    )
                events = run(generation)
                try:
                    async for event in events:
                        await self._buffer.put(pb.BatchGenerateResponse(item_id=item.item_id, event=event))
                finally:
                    await events.aclose()
        except TimeoutError:
            raise Expired(Reason.DEADLINE_EXCEEDED, f"the item's timeout of {timeout:g} s passed") from None
        finally:
            ticket.leave()


def _checked(request: pb.BatchGenerateRequest, limits: Limits) -> Iterator[tuple[int, pb.BatchGenerateItem]]:
    if not 1 <= len(request.items) <= limits.max_batch_items:
        raise invalid("items", f"has {len(request.items)} entries", f"use 1 to {limits.max_batch_items}")
    seen: set[str] = set()
    for position, item in enumerate(request.items):
        field = f"items[{position}].item_id"
        size = len(item.item_id.encode())
        if not 1 <= size <= limits.max_item_id_bytes:
            raise invalid(field, f"has {size} bytes", f"use 1 to {limits.max_item_id_bytes}")
        if item.item_id in seen:
            raise invalid(field, "repeats an earlier one", "give each item its own id")
        seen.add(item.item_id)
    return iter(list(enumerate(request.items)))


def _timeout(position: int, item: pb.BatchGenerateItem) -> float | None:
    if not item.HasField("timeout"):
        return None
    return check_duration(f"items[{position}].timeout", item.timeout)
