"""The probe listener: a bounded HTTP/1.1 server for `/livez`, `/readyz` and `/metrics`, one answer a connection."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from loramux_server.telemetry.prometheus import CONTENT_TYPE

_MAX_CONNECTIONS = 64
_MAX_HEAD_BYTES = 8192
_TIMEOUT_S = 5.0
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSources:
    """What the probe answers with; called for each request.

    Attributes:
        live: False once a restart of the process is the only help.
        ready: Whether requests are accepted.
        metrics: Prometheus text.
    """

    live: Callable[[], bool]
    ready: Callable[[], bool]
    metrics: Callable[[], str]


class ProbeServer:
    """Listens until closed."""

    def __init__(self, sources: ProbeSources) -> None:
        """Create a server that does not listen yet."""
        self._sources = sources
        self._server: asyncio.Server | None = None
        self._connections = 0

    async def start(self, host: str, port: int) -> int:
        """Listen.

        Args:
            host: Address.
            port: 0 picks one.

        Returns:
            The port.

        Raises:
            OSError: The address is taken or not ours.
        """
        self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_BYTES)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= _MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections += 1
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            writer.transport.abort()
        finally:
            self._connections -= 1
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        parts = head.split(b"\r\n", 1)[0].split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return _response(400, "not HTTP/1.1\n")
        method, target = parts[0], parts[1].split(b"?", 1)[0]
        if method not in (b"GET", b"HEAD"):
            return _response(405, "use GET\n")
        if target == b"/livez":
            answer = _health(self._sources.live())
        elif target == b"/readyz":
            answer = _health(self._sources.ready())
        elif target == b"/metrics":
            answer = _response(200, self._sources.metrics(), CONTENT_TYPE)
        else:
            answer = _response(404, "use /livez, /readyz or /metrics\n")
        return answer if method == b"GET" else answer.split(b"\r\n\r\n", 1)[0] + b"\r\n\r\n"


def _health(good: bool) -> bytes:
    return _response(200, "ok\n") if good else _response(503, "not ok\n")


def _response(status: int, text: str, content_type: str = "text/plain; charset=utf-8") -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
