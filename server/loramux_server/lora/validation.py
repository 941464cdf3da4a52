"""The front end's side of the validation worker: starts it, asks it, and starts it again when it dies or hangs."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

import loramux_server
from loramux_server.errors import (
    Expired,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    LoramuxServerError,
    Reason,
    ResourceExhausted,
    Unavailable,
)
from loramux_server.lora import worker_messages as wire

_log = logging.getLogger(__name__)

# The worker reads hostile files: it gets nothing of the environment that it does not need.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBase:
    """The base that adapters are checked against.

    Attributes:
        fingerprint: Its digest, hex.
        parts: Digest by part.
    """

    fingerprint: str
    parts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Bounds of the worker.

    Attributes:
        start_seconds: Until it must have started.
        seconds: Wall time of one validation.
        cpu_seconds: Processor time of one validation.
        memory_bytes: Its address space.
        queued: Most validations that wait or run; more are refused.
    """

    start_seconds: float = 60.0
    seconds: float = 300.0
    cpu_seconds: int = 120
    memory_bytes: int = 2 << 30
    queued: int = 32


class _WorkerDied(Exception):
    """The worker ended in the middle of a validation."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Worker:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def receive(self) -> wire.Reply:
        prefix = await self.reader.readexactly(wire.LENGTH.size)
        return wire.REPLIES.decode(await self.reader.readexactly(wire.body_length(prefix)))

    async def ask(self, request: wire.ValidateAdapter) -> wire.Answer:
        self.writer.write(wire.encode(request))
        await self.writer.drain()
        reply = await self.receive()
        if isinstance(reply, wire.Started) or reply.id != request.id:
            raise wire.WorkerFrameError("the worker answered another request")
        return reply

    def kill(self) -> None:
        self.writer.close()
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)


class ValidationWorker:
    """Validates adapter directories in a process of its own, one at a time, in order of arrival.

    Args:
        base_config: The base's `config.json`.
        max_rank: Largest rank taken.
        base: Gives the served base; asked at every validation, may raise `Unavailable` while there is none.
        allow_unverified: Take adapters without a manifest.
        limits: Bounds.
    """

    def __init__(
        self,
        base_config: Path,
        *,
        max_rank: int,
        base: Callable[[], ServedBase],
        allow_unverified: bool = False,
        limits: WorkerLimits = WorkerLimits(),  # noqa: B008 - frozen
    ) -> None:
        self._base_config = base_config
        self._max_rank = max_rank
        self._base = base
        self._allow_unverified = allow_unverified
        self._limits = limits
        self._turn = asyncio.Lock()
        self._ids = itertools.count(1)
        self._inside = 0
        self._worker: _Worker | None = None
        self._closed = False
        self.starts = 0

    async def start(self) -> None:
        """Start the process now rather than at the first validation.

        Raises:
            Internal: It does not start.
        """
        async with self._turn:
            await self._ensure()

    async def validate(self, directory: Path) -> wire.Validated:
        """Check one adapter.

        Args:
            directory: The PEFT directory; nobody writes to it meanwhile.

        Returns:
            Digest and summary.

        Raises:
            FailedPrecondition: ADAPTER_INCOMPATIBLE or ADAPTER_NUMERICS.
            InvalidRequest: The adapter can never be taken.
            ResourceExhausted: QUEUE_FULL, too many validations wait.
            Expired: It took longer than the limit.
            Unavailable: The files cannot be read now, or the server is shutting down.
            Internal: The worker died, and so did the one after it.
        """
        if self._inside >= self._limits.queued:
            raise ResourceExhausted(
                Reason.QUEUE_FULL,
                f"{self._inside} uploads are being validated, which is the limit; retry in a few seconds",
                retry_after=5.0,
            )
        self._inside += 1
        try:
            async with self._turn:
                try:
                    return await self._validate(directory)
                except _WorkerDied:
                    # Killed from outside, perhaps; a directory that kills workers does it again.
                    _log.warning("the process that validates adapters died; trying once more on a new one")
                try:
                    return await self._validate(directory)
                except _WorkerDied as error:
                    raise Internal(
                        Reason.INTERNAL, "the process that validates adapters died twice; report it if it persists"
                    ) from error
        finally:
            self._inside -= 1

    async def close(self) -> None:
        """End the worker; a validation under way fails with `Unavailable`. Idempotent."""
        self._closed = True
        if self._worker is not None:
            self._worker.kill()
        async with self._turn:
            await self._end()

    async def _validate(self, directory: Path) -> wire.Validated:
        base = self._base()
        worker = await self._ensure()
        request = wire.ValidateAdapter(
            id=next(self._ids),
            directory=str(directory),
            base_config=str(self._base_config),
            max_rank=self._max_rank,
            base_fingerprint=base.fingerprint,
            base_parts=dict(base.parts),
            allow_unverified=self._allow_unverified,
        )
        answered = False
        try:
            async with asyncio.timeout(self._limits.seconds):
                answer = await worker.ask(request)
            answered = True
        except TimeoutError as error:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"validation took longer than {self._limits.seconds:g} s; retry, or publish a smaller adapter",
            ) from error
        except (OSError, EOFError, msgspec.MsgspecError, wire.WorkerFrameError) as error:
            if self._closed:
                raise _closing() from error
            raise _WorkerDied from error
        finally:
            if not answered:
                # Whatever it is busy with belongs to nobody any more, also when the caller was cancelled.
                await self._end()
        return _result(answer)

    async def _ensure(self) -> _Worker:
        if self._closed:
            raise _closing()
        if self._worker is not None and self._worker.process.returncode is not None:
            await self._end()
        if self._worker is None:
            self._worker = await self._spawn()
            started = False
            try:
                async with asyncio.timeout(self._limits.start_seconds):
                    await self._worker.receive()
                started = True
            except (TimeoutError, OSError, EOFError, msgspec.MsgspecError, wire.WorkerFrameError) as error:
                if self._closed:
                    raise _closing() from error
                raise Internal(
                    Reason.INTERNAL, "the process that validates adapters does not start; see the server's log"
                ) from error
            finally:
                if not started:
                    await self._end()
        return self._worker

    async def _spawn(self) -> _Worker:
        self.starts += 1
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "loramux_server.lora.worker",
                "--fd",
                str(theirs.fileno()),
                "--memory-bytes",
                str(self._limits.memory_bytes),
                "--cpu-seconds",
                str(self._limits.cpu_seconds),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        return _Worker(process=process, reader=reader, writer=writer)

    async def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            await worker.process.wait()


def _environment() -> dict[str, str]:
    root = str(Path(loramux_server.__file__).resolve().parents[1])
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _closing() -> LoramuxServerError:
    return Unavailable(Reason.DRAINING, "the server is shutting down; retry on another replica", retry_after=1.0)


def _result(answer: wire.Answer) -> wire.Validated:
    if isinstance(answer, wire.Validated):
        return answer
    if isinstance(answer, wire.Unreadable):
        raise Unavailable(
            Reason.STORE_UNAVAILABLE,
            f"the uploaded files cannot be read now ({answer.message}); retry",
            retry_after=1.0,
        )
    reason = Reason(answer.reason)
    kind = InvalidRequest if reason is Reason.INVALID_PARAMETER else FailedPrecondition
    raise kind(reason, answer.message, field=answer.field, metadata={"subject": answer.field[:128]})
