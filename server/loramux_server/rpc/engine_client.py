"""The front end's side of the engine socket: sends commands, routes events to the requests that wait for them.

One frame out a loop tick, however many handlers sent commands in it; frames in are decoded by a protocol and pushed
into one `RequestStream` a request. The client outlives engine processes: `attach` starts an epoch, `detach` ends it and
fails every waiter. Events of any other epoch are dropped.
"""

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from loramux_server.engine import messages as wire
from loramux_server.engine.frames import encode_frame
from loramux_server.errors import Internal, LoramuxServerError, Reason, Unavailable, from_reason
from loramux_server.rpc.frame_protocol import FrameProtocol
from loramux_server.rpc.request_stream import RequestEvent, RequestStream

_log = logging.getLogger(__name__)

_MAX_FRAME_COMMANDS = 256
_MAX_FRAME_TOKENS = 1_000_000
_RETRY_AFTER_S = (1.0, 30.0)
# Until an engine of this server has been ready once.
_ASSUMED_START_S = 5.0
# Silence is counted in checks and not by the clock alone: a front end that was itself stopped for a while finds the
# frames of that time unread.
_CHECKS = 4


class EngineClient:
    """The engine as handlers see it: submit, abort, stop, adapter table, and the newest `Stats`.

    An engine with work in flight reports at least once a step, and an idle one answers pings. One that is silent for
    `hang_seconds` is taken for hung: its epoch ends as if it had died, and `hung` tells the supervisor not to wait for
    its exit.
    """

    def __init__(self, *, hang_seconds: float = 120.0) -> None:
        """Create a client that is not attached to any engine.

        Args:
            hang_seconds: See the class; longer than any step, a first one that compiles kernels included.
        """
        self.hung = False
        self._hang_seconds = hang_seconds
        self._silent_checks = 0
        self._watchdog: asyncio.TimerHandle | None = None
        self._start_seconds = _ASSUMED_START_S
        self._away_since = time.monotonic()
        self._shutting_down = False
        self.ready: wire.Ready | None = None
        self.stats: wire.Stats | None = None
        self.on_version_state: Callable[[wire.VersionState], None] | None = None
        self.on_stats: Callable[[wire.Stats], None] | None = None
        self._epoch = -1
        self._serving = False
        self._why_not = "the engine is starting"
        self._protocol: FrameProtocol | None = None
        self._lost: asyncio.Future[str] | None = None
        self._got_ready: asyncio.Future[wire.Ready] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._operations: dict[str, asyncio.Future[None]] = {}
        self._outbox: list[wire.Command] = []
        self._flush_scheduled = False
        self._waiting = 0

    # --- life of an epoch ------------------------------------------------------------------------------------------

    async def attach(self, sock: socket.socket, epoch: int) -> None:
        """Begin to talk to a new engine process; requests are still refused until `open` is called.

        Args:
            sock: Our end of the socket pair; owned by the client from now on.
            epoch: Number that the engine echoes in every frame.
        """
        assert self._protocol is None, "attach before detach"
        loop = asyncio.get_running_loop()
        self._epoch = epoch
        self.hung = False
        self._lost = loop.create_future()
        self._got_ready = loop.create_future()
        protocol = FrameProtocol(self._on_frame, self._on_end)
        await loop.create_connection(lambda: protocol, sock=sock)
        self._protocol = protocol

    async def wait_ready(self) -> wire.Ready:
        """Wait for the engine's `Ready`.

        Raises:
            ConnectionError: The socket ended first.
        """
        assert self._got_ready is not None and self._lost is not None, "not attached"
        either: set[asyncio.Future[Any]] = {self._got_ready, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._got_ready.done():
            return self._got_ready.result()
        raise ConnectionError(self._lost.result())

    async def wait_lost(self) -> str:
        """Wait until the socket ends and say why."""
        assert self._lost is not None, "not attached"
        return await asyncio.shield(self._lost)

    def open(self, resync: Sequence[wire.Command]) -> None:
        """Send the adapter table, then accept requests.

        Args:
            resync: Commands that bring a fresh engine to the registry's state.
        """
        for command in resync:
            self.send(command)
        self._serving = True
        self._start_seconds = time.monotonic() - self._away_since
        self._watch()

    def detach(self, why: str) -> None:
        """End the epoch: close the socket and fail everything that waits.

        Args:
            why: Text for the waiters, without a trailing period.
        """
        self._serving = False
        self._why_not = why
        self._away_since = time.monotonic()
        self.ready = None
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        self.stats = None
        self._outbox.clear()
        if self._protocol is not None and self._protocol.transport is not None:
            self._protocol.transport.abort()
        self._protocol = None
        error = self.unavailable()
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
        self._waiting = 0
        for operation in self._operations.values():
            if not operation.done():
                operation.set_exception(self.unavailable())
        self._operations.clear()

    def shutdown(self) -> None:
        """Refuse requests from now on and ask the engine to end; `wait_lost` tells when it did."""
        self._serving = False
        self._shutting_down = True
        if self._protocol is not None:
            self.send(wire.Shutdown())

    @property
    def serving(self) -> bool:
        """Whether requests are accepted."""
        return self._serving

    # --- requests --------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that were sent and have not started yet."""
        return self._waiting

    @property
    def open_requests(self) -> int:
        """Requests without a `Done`."""
        return len(self._streams)

    def check_serving(self) -> None:
        """Refuse when there is no engine.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE.
        """
        if not self._serving:
            raise self.unavailable()

    def unavailable(self, why: str | None = None) -> Unavailable:
        """Return the error of a request that meets no engine; a retry is worth while when the next one is ready.

        Args:
            why: None = as things stand.
        """
        if self._shutting_down:
            return Unavailable(
                Reason.DRAINING, "this server is shutting down; use another replica", retry_after=_RETRY_AFTER_S[0]
            )
        least, most = _RETRY_AFTER_S
        left = self._start_seconds - (time.monotonic() - self._away_since)
        return Unavailable(
            Reason.ENGINE_UNAVAILABLE,
            f"{why or self._why_not}; retry in a moment",
            retry_after=round(min(most, max(least, left)), 3),
        )

    def submit(self, add: wire.Add) -> RequestStream:
        """Send a request.

        Args:
            add: The request; its id must be new.

        Returns:
            The stream of its events; `release` it when it is not read to its `Done`.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE.
        """
        self.check_serving()
        assert add.request_id not in self._streams, "request ids are unique"
        stream = RequestStream(add.request_id)
        self._streams[add.request_id] = stream
        self._waiting += 1
        self.send(add)
        return stream

    def release(self, stream: RequestStream) -> None:
        """Let go of a stream; if the request is still alive in the engine it is aborted. Idempotent."""
        if self._streams.pop(stream.request_id, None) is None:
            return
        if not stream.started:
            self._waiting -= 1
        if not stream.done and self._protocol is not None:
            self.send(wire.Abort(request_id=stream.request_id))

    def abort(self, request_id: str) -> None:
        """Ask the engine to cancel a request whose stream stays open for its `Done`."""
        if self._protocol is not None:
            self.send(wire.Abort(request_id=request_id))

    def send(self, command: wire.Command) -> None:
        """Queue a command; everything queued in one tick leaves in one frame."""
        self._outbox.append(command)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    # --- adapters (`EngineLink`) -----------------------------------------------------------------------------------

    def put_version(self, spec: wire.VersionSpec) -> None:
        """Make a version known to the engine. Without an engine nothing is sent: the next resync has it."""
        self._send_if_attached(wire.PutVersion(spec=spec))

    def drop_version(self, version: str) -> None:
        """Forget a version."""
        self._send_if_attached(wire.DropVersion(version=version))

    def put_alias(self, spec: wire.AliasSpec) -> None:
        """Set where an alias points."""
        self._send_if_attached(wire.PutAlias(spec=spec))

    def drop_alias(self, alias: str, revision: int) -> None:
        """Forget an alias."""
        self._send_if_attached(wire.DropAlias(alias=alias, revision=revision))

    async def preload(self, version: str) -> None:
        """Load a version into the slab and wait until it is there.

        Raises:
            LoramuxServerError: ENGINE_UNAVAILABLE, or what the engine answered.
        """
        operation_id = secrets.token_hex(8)
        await self._operate(operation_id, wire.Preload(operation_id=operation_id, version=version))

    async def unload(self, version: str) -> None:
        """Free a version's slab rows and wait until no sequence uses them.

        Raises:
            LoramuxServerError: ENGINE_UNAVAILABLE, or what the engine answered.
        """
        operation_id = secrets.token_hex(8)
        await self._operate(operation_id, wire.Unload(operation_id=operation_id, version=version))

    def check_integrity(self) -> None:
        """Assert what must hold between any two loop ticks."""
        assert self._waiting == sum(1 for stream in self._streams.values() if not stream.started)
        assert all(not stream.done for stream in self._streams.values())

    # --- internals -------------------------------------------------------------------------------------------------

    async def _operate(self, operation_id: str, command: wire.Command) -> None:
        self.check_serving()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._operations[operation_id] = waiter
        try:
            self.send(command)
            await waiter
        finally:
            self._operations.pop(operation_id, None)

    def _send_if_attached(self, command: wire.Command) -> None:
        if self._serving:
            self.send(command)

    # --- watchdog --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._watchdog = asyncio.get_running_loop().call_later(self._hang_seconds / _CHECKS, self._check_alive)

    def _check_alive(self) -> None:
        busy = bool(self._streams or self._operations)
        self._silent_checks = self._silent_checks + 1 if busy or self._serving else 0
        if self._silent_checks > _CHECKS:
            self.hung = True
            what = "with work in flight" if busy else "and answers no ping"
            self._on_end(f"the engine was silent for {self._hang_seconds:g} s {what}")
            return
        if not busy:
            # Silent by itself: without a question, that it hangs would show with the next request only.
            self._send_if_attached(wire.Ping())
        self._watch()

    def _flush(self) -> None:
        self._flush_scheduled = False
        commands, self._outbox = self._outbox, []
        if self._protocol is None or self._protocol.transport is None:
            return
        while commands:
            taken = _frame_length(commands)
            self._protocol.transport.write(encode_frame(wire.CommandFrame(commands=commands[:taken])))
            commands = commands[taken:]

    def _on_end(self, why: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(why)

    def _on_frame(self, frame: wire.EventFrame) -> None:
        if frame.epoch != self._epoch:
            _log.warning("dropped a frame of epoch %d in epoch %d", frame.epoch, self._epoch)
            return
        self._silent_checks = 0
        for event in frame.events:
            self._on_event(event)

    def _on_event(self, event: wire.Event) -> None:
        if isinstance(event, RequestEvent):
            stream = self._streams.get(event.request_id)
            if stream is None:
                return
            if isinstance(event, wire.Started | wire.Done) and not stream.started:
                stream.started = True
                self._waiting -= 1
            if isinstance(event, wire.Done):
                del self._streams[event.request_id]
            stream.push(event)
        elif isinstance(event, wire.Stats):
            self.stats = event
            if self.on_stats is not None:
                self.on_stats(event)
        elif isinstance(event, wire.Completed):
            waiter = self._operations.get(event.operation_id)
            if waiter is not None and not waiter.done():
                if event.error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error_of(event.error))
        elif isinstance(event, wire.VersionState):
            if self.on_version_state is not None:
                self.on_version_state(event)
        elif isinstance(event, wire.Ready):
            self.ready = event
            if self._got_ready is not None and not self._got_ready.done():
                self._got_ready.set_result(event)


def error_of(spec: wire.ErrorSpec | None) -> LoramuxServerError:
    """Rebuild the error of a failed request; a failure without one is a bug of the engine."""
    if spec is None:
        return Internal(Reason.INTERNAL, "the engine failed the request without a reason")
    error = from_reason(spec.reason, spec.message, retry_after=spec.retry_after)
    error.field = spec.field or None
    return error


def _frame_length(commands: Sequence[wire.Command]) -> int:
    """Return how many of the commands fit into one frame: at least one."""
    tokens = 0
    for taken, command in enumerate(commands[:_MAX_FRAME_COMMANDS]):
        if isinstance(command, wire.Add):
            tokens += len(command.prompt_token_ids)
            if tokens > _MAX_FRAME_TOKENS and taken > 0:
                return taken
    return min(len(commands), _MAX_FRAME_COMMANDS)
