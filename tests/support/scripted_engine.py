"""An engine without a scheduler: a peer of the socket pair that plays a script for each request.

It speaks the real frames, so everything in front of the socket is the code that serves. What it was asked to do is
recorded, and every request that it got must have been ended by exactly one `Done` (`assert_at_rest`).
"""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import Callable

from loramux_server.engine import messages as wire
from loramux_server.engine.frames import FrameDecoder, encode_frame


@dataclasses.dataclass(kw_only=True)
class Script:
    """What happens to one request.

    Attributes:
        token_ids: Output of every sequence.
        finish: `stop` (the last id is an end token) or `length`.
        per_frame: Ids an event.
        delay: Seconds between events.
        hold: Waited for before `Started`.
        pause_after: Ids after which `resume` is waited for.
        resume: See `pause_after`.
        error: The request fails with it, before `Started`, or after `error_after` ids.
        error_after: See `error`.
        version: Bound version key; "" = the base.
        cached_tokens: For `Started`.
        top: Alternatives of each log-probability.
    """

    token_ids: list[int] = dataclasses.field(default_factory=lambda: [70, 71, 72])
    finish: str = "length"
    per_frame: int = 1
    delay: float = 0.0
    hold: asyncio.Event | None = None
    pause_after: int | None = None
    resume: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    error: wire.ErrorSpec | None = None
    error_after: int | None = None
    version: str = ""
    cached_tokens: int = 0
    top: int = 0


class ScriptedEngine:
    """One engine process's stand-in; see the module."""

    def __init__(self, epoch: int, factory: "ScriptedEngines") -> None:
        self.epoch = epoch
        self.sock, self._peer = socket.socketpair()
        self._peer.setblocking(False)
        self.startup_error = factory.startup_error
        self.open: dict[str, asyncio.Task[None]] = {}
        self.ended: list[str] = []
        self._factory = factory
        self._step = 0
        self._stopped: dict[tuple[str, int], int] = {}
        self._send_lock = asyncio.Lock()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._run())

    def started(self) -> None:
        pass

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        self._end(-9)

    def crash(self) -> None:
        """Die without a word."""
        self._end(1)

    def _end(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)
        self._main.cancel()
        for task in self.open.values():
            task.cancel()
        self._peer.close()

    async def _run(self) -> None:
        if self._factory.startup_error is not None:
            self._end(3)
            return
        if self._factory.start_gate is not None:
            await self._factory.start_gate.wait()
        await self.send(self._factory.ready)
        decoder = FrameDecoder(wire.CommandFrame)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await loop.sock_recv(self._peer, 65536):
                for frame in decoder.feed(data):
                    self._factory.frames += 1
                    for command in frame.commands:
                        await self._take(command)
                        if self._exit.done():
                            return
        self._end(0)

    async def send(self, *events: wire.Event, epoch: int | None = None) -> None:
        self._step += 1
        frame = wire.EventFrame(epoch=self.epoch if epoch is None else epoch, step=self._step, events=list(events))
        async with self._send_lock:
            with contextlib.suppress(ConnectionError):
                await asyncio.get_running_loop().sock_sendall(self._peer, encode_frame(frame))

    async def _take(self, command: wire.Command) -> None:
        self._factory.commands.append(command)
        if isinstance(command, wire.Add):
            assert command.request_id not in self.open, "repeated id"
            task = asyncio.create_task(self._play(command, self._factory.script(command)))
            self.open[command.request_id] = task
        elif isinstance(command, wire.Abort):
            task_or_none = self.open.get(command.request_id)
            if task_or_none is not None:
                task_or_none.cancel()
        elif isinstance(command, wire.Stop):
            self._stopped[command.request_id, command.index] = command.tokens
        elif isinstance(command, wire.Preload | wire.Unload):
            await self.send(wire.Completed(operation_id=command.operation_id, error=self._factory.operation_error))
        elif isinstance(command, wire.Ping):
            if not self._factory.deaf:
                await self.send(wire.Pong())
        elif isinstance(command, wire.Shutdown):
            self._end(0)

    async def _play(self, add: wire.Add, script: Script) -> None:
        status, error, sent = "finished", None, 0
        try:
            if script.hold is not None:
                await script.hold.wait()
            if script.error is not None and script.error_after is None:
                status, error = "failed", script.error
                return
            await self.send(
                wire.Started(
                    request_id=add.request_id,
                    version=script.version,
                    digest=script.version.rpartition("/")[2],
                    revision=7 if script.version else 0,
                    cached_tokens=script.cached_tokens,
                    queue_time=0.01,
                    load_time=0.005 if script.version else 0.0,
                )
            )
            if add.sampling.prompt_logprobs is not None:
                entries = [_logprob(script.top) for _ in add.prompt_token_ids[1:]]
                await self.send(wire.PromptLogprobs(request_id=add.request_id, start=1, entries=entries))
            tokens = script.token_ids[: add.sampling.max_tokens]
            live = set(range(add.sampling.n))
            for first in range(0, len(tokens), script.per_frame):
                if script.pause_after is not None and first >= script.pause_after:
                    await script.resume.wait()
                if script.error is not None and script.error_after is not None and first >= script.error_after:
                    status, error = "failed", script.error
                    return
                await asyncio.sleep(script.delay)
                ids = tokens[first : first + script.per_frame]
                for index in sorted(live):
                    if (add.request_id, index) in self._stopped:
                        live.discard(index)
                        continue
                    sent += len(ids)
                    await self.send(self._tokens(add, index, first, ids, script))
            for index in sorted(live):
                await self.send(
                    wire.SequenceFinished(
                        request_id=add.request_id,
                        index=index,
                        reason=script.finish,
                        stop_token_id=tokens[-1] if script.finish == "stop" else None,
                        tokens=len(tokens),
                    )
                )
        except asyncio.CancelledError:
            status = "cancelled"
            if self._exit.done():
                raise
        finally:
            if not self._exit.done():
                del self.open[add.request_id]
                self.ended.append(add.request_id)
                await self.send(
                    wire.Done(
                        request_id=add.request_id,
                        status=status,
                        error=error,
                        prompt_tokens=len(add.prompt_token_ids),
                        cached_tokens=script.cached_tokens,
                        output_tokens=sent,
                        computed_tokens=sent,
                        prefill_time=0.01,
                        decode_time=0.02,
                    )
                )

    def _tokens(self, add: wire.Add, index: int, first: int, ids: list[int], script: Script) -> wire.Tokens:
        logprobs = [] if add.sampling.logprobs is None else [_logprob(script.top) for _ in ids]
        return wire.Tokens(request_id=add.request_id, index=index, first=first, token_ids=list(ids), logprobs=logprobs)


class ScriptedEngines:
    """Launches scripted engines and remembers what they were told.

    Attributes:
        script: Chooses the script of a request.
        ready: What each engine reports.
        startup_error: When set, engines end with it at once.
        start_gate: When set, engines wait for it before they are ready.
        operation_error: Answer to Preload and Unload.
        commands: All commands, in order.
        frames: Command frames received.
    """

    def __init__(self, script: Callable[[wire.Add], Script] | None = None) -> None:
        self.script = script or (lambda add: Script())
        self.ready = wire.Ready(
            fingerprint="f" * 64,
            max_model_len=512,
            vocab_size=512,
            device="cpu",
            weights="nf4",
            resident_weight_bytes=1234,
            kv_pages=256,
            page_size=16,
            rank_units=64,
            max_rank=64,
            details={"fingerprint.config": "c" * 64, "fingerprint.weights": "d" * 64},
        )
        self.startup_error: str | None = None
        self.start_gate: asyncio.Event | None = None
        self.operation_error: wire.ErrorSpec | None = None
        self.deaf = False
        self.commands: list[wire.Command] = []
        self.frames = 0
        self.engines: list[ScriptedEngine] = []

    async def __call__(self, epoch: int) -> ScriptedEngine:
        engine = ScriptedEngine(epoch, self)
        self.engines.append(engine)
        return engine

    @property
    def current(self) -> ScriptedEngine:
        return self.engines[-1]

    @property
    def adds(self) -> list[wire.Add]:
        return [command for command in self.commands if isinstance(command, wire.Add)]

    @property
    def aborts(self) -> list[str]:
        return [command.request_id for command in self.commands if isinstance(command, wire.Abort)]

    @property
    def stops(self) -> list[wire.Stop]:
        return [command for command in self.commands if isinstance(command, wire.Stop)]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait, on the loop's own events, until something holds."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - a condition of many parts has no event
                await asyncio.sleep(0.002)

    async def assert_at_rest(self) -> None:
        """Every request was ended."""
        await self.until(lambda: not self.current.open)
        assert len(self.current.ended) == len(set(self.current.ended))


def _logprob(top: int) -> wire.TokenLogprob:
    return wire.TokenLogprob(logprob=-0.5, top=[(token, -0.5 - token) for token in range(top)])
