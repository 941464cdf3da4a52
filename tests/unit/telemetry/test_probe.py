"""The probe listener takes hostile input."""

import asyncio

import pytest

from loramux_server.telemetry import probe
from loramux_server.telemetry.probe import ProbeServer, ProbeSources


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /readyz?verbose HTTP/1.0\r\nHost: x\r\n\r\n", b"503"),
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\n", b"400"),
        (b"GET /livez HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", b""),
        (b"\r\n\r\n", b"400"),
    ],
)
async def test_answers(request_: bytes, status: bytes) -> None:
    server = ProbeServer(ProbeSources(live=lambda: True, ready=lambda: False, metrics=lambda: "a 1\n"))
    port = await server.start("127.0.0.1", 0)
    try:
        answer = await ask(port, request_)
        assert (answer.split(b" ")[1] if answer else b"") == status
        if b"/metrics HTTP" in request_ and status == b"200":
            assert answer.endswith(b"\r\n\r\na 1\n") and b"Content-Length: 4\r\n" in answer
        head = await ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert head.endswith(b"\r\n\r\n") and b"200 OK" in head
    finally:
        await server.close()


async def test_silent_and_too_many_connections_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(probe, "_MAX_CONNECTIONS", 2)
    server = ProbeServer(ProbeSources(live=lambda: True, ready=lambda: True, metrics=str))
    port = await server.start("127.0.0.1", 0)
    try:
        silent = [asyncio.create_task(ask(port, b"GET")) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert await ask(port, b"GET /livez HTTP/1.1\r\n\r\n") == b""
        assert await asyncio.gather(*silent) == [b"", b""]
        assert b"200" in await ask(port, b"GET /livez HTTP/1.1\r\n\r\n")
    finally:
        await server.close()
