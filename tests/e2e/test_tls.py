"""TLS of the listener: who gets in, what a rotation changes, what refuses the start; through both SDK clients."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("trustme", reason="trustme is not installed: pip install 'loramux[dev]'")

import trustme

from loramux import AsyncClient, Client, RetryPolicy, TLSConfig, Unavailable
from loramux_server.app import App
from loramux_server.rpc.certificate import CertificateFiles
from loramux_server.startup import ServeError
from tests.support.certificates import Mount, issue, pems, serial, settings, shown_serial, trusting, write_pair
from tests.support.front_end import NoUploads, front_end, make_config
from tests.support.scripted_engine import Script, ScriptedEngines

ONCE = RetryPolicy(max_attempts=1)
TOKENS = [70, 71] * 20


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> CertificateFiles:
    return write_pair(tmp_path / "tls", issue(ca))


def _blocking(address: str, tls: bool | TLSConfig) -> str:
    with Client(address, tls=tls, retry=ONCE, timeout=20) as client:
        client.model()
        return client.generate("hello", max_tokens=40).result().text


async def ask(address: str, tls: bool | TLSConfig) -> str:
    """Generate through both clients, which agree."""
    async with AsyncClient(address, tls=tls, retry=ONCE, timeout=20) as client:
        await client.model()
        text = (await client.generate("hello", max_tokens=40).result()).text
    assert await asyncio.to_thread(_blocking, address, tls) == text
    return text


async def refused(address: str, tls: bool | TLSConfig) -> str:
    """Have both clients refused, unary and stream; return what they say."""
    said = set()
    async with AsyncClient(address, tls=tls, retry=ONCE, timeout=20) as client:
        for call in (client.model, client.generate("hello").result):
            with pytest.raises(Unavailable) as error:
                await call()
            said.add(str(error.value).split(" (")[0])
    with Client(address, tls=tls, retry=ONCE, timeout=20) as blocking:
        for blocking_call in (blocking.model, blocking.generate("hello").result):
            with pytest.raises(Unavailable) as error:
                await asyncio.to_thread(blocking_call)
            said.add(str(error.value).split(" (")[0])
    (only,) = said
    return only


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - what is waited for happens in files and threads
            await asyncio.sleep(0.02)


async def test_who_trusts_the_authority_is_served(tmp_path: Path, ca: trustme.CA, files: CertificateFiles) -> None:
    async with front_end(tmp_path, **settings(files)) as server:
        address = f"localhost:{server.app.port}"
        assert await ask(address, trusting(ca))
        assert "does not use: give tls=True" in await refused(address, tls=False)
        assert "is not trusted; give its authority" in await refused(address, trusting(trustme.CA()))
        assert "is for another name" in await refused(f"127.0.0.1:{server.app.port}", trusting(ca))
        named = TLSConfig(root_certificates=ca.cert_pem.bytes(), server_name="localhost")
        assert await ask(f"127.0.0.1:{server.app.port}", named)
        assert server.metric("loramux_tls_certificate_expiry_seconds") > 3e9
        assert server.metric("loramux_tls_certificate_stale") == 0
        await server.assert_at_rest()


async def test_plaintext_says_so_to_a_client_with_tls(tmp_path: Path, ca: trustme.CA) -> None:
    async with front_end(tmp_path) as server:
        assert "does not speak TLS" in await refused(f"localhost:{server.app.port}", trusting(ca))
        assert "loramux_tls" not in server.app.telemetry.prometheus()


async def test_mutual(tmp_path: Path, ca: trustme.CA, files: CertificateFiles) -> None:
    clients = trustme.CA()
    authorities = tmp_path / "clients.pem"
    authorities.write_bytes(clients.cert_pem.bytes())
    mutual = CertificateFiles(cert=files.cert, key=files.key, client_ca=authorities)
    async with front_end(tmp_path, **settings(mutual)) as server:
        address = f"localhost:{server.app.port}"
        assert await ask(address, trusting(ca, issue(clients)))
        for stranger in (None, issue(ca), issue(clients, expired=True)):
            assert "it may ask for a client certificate" in await refused(address, trusting(ca, stranger))
        # Authorities rotate as certificates do.
        others = trustme.CA()
        authorities.write_bytes(others.cert_pem.bytes())
        await until(lambda: server.app.tls is not None and server.app.tls.stats().reloads == 1)
        assert await ask(address, trusting(ca, issue(others)))
        assert "client certificate" in await refused(address, trusting(ca, issue(clients)))


async def test_a_rotation_leaves_streams_alone(tmp_path: Path, ca: trustme.CA) -> None:
    first, second = issue(ca), issue(ca)
    mount = Mount(tmp_path / "mount", first)
    go_on = asyncio.Event()
    engines = ScriptedEngines(lambda add: Script(token_ids=TOKENS, pause_after=2, resume=go_on))
    async with front_end(tmp_path, engines, **settings(mount.files)) as server:
        port = server.app.port

        def shown() -> str:
            return shown_serial(port, ca)

        assert await asyncio.to_thread(shown) == serial(first)
        async with (
            AsyncClient(f"localhost:{port}", tls=trusting(ca)) as client,
            client.generate("hello", max_tokens=len(TOKENS)) as stream,
        ):
            mount.put(second)
            await until(lambda: shown() == serial(second))
            assert server.metric("loramux_tls_certificate_reloads_total") == 1
            mount.put(issue(ca), key=pems(first)[1])
            await until(lambda: server.metric("loramux_tls_certificate_stale") == 1)
            assert await asyncio.to_thread(shown) == serial(second)
            # The same connection, new calls.
            assert (await client.model()).name
            go_on.set()
            assert len([token async for delta in stream for token in delta.token_ids]) == len(TOKENS)
        assert await ask(f"localhost:{port}", trusting(ca))
        third = issue(ca)
        mount.put(third)
        await until(lambda: shown() == serial(third))
        assert server.metric("loramux_tls_certificate_stale") == 0
        assert server.metric("loramux_tls_certificate_reloads_total") == 2
        await server.assert_at_rest()


async def test_files_that_cannot_serve_refuse_the_start(
    tmp_path: Path, ca: trustme.CA, files: CertificateFiles
) -> None:
    files.key.write_bytes(pems(issue(ca))[1])
    app = App(make_config(tmp_path, **settings(files)), version="test", launch=ScriptedEngines(), validator=NoUploads())
    with pytest.raises(ServeError, match="--tls-key .*tls.key does not belong to"):
        await app.start()
    assert not (tmp_path / "store").exists() and app.port == 0


async def test_an_expired_certificate_starts_with_a_warning(
    tmp_path: Path, ca: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_pair(tmp_path / "tls", issue(ca, expired=True))
    async with front_end(tmp_path, **settings(files)) as server:
        assert any("expired on 2020-01-02" in record.getMessage() for record in caplog.records)
        assert "has expired" in await refused(f"localhost:{server.app.port}", trusting(ca))


async def test_a_port_in_use_is_told_from_a_certificate(tmp_path: Path, files: CertificateFiles) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        app = App(
            make_config(tmp_path, port=port, **settings(files)),
            version="test",
            launch=ScriptedEngines(),
            validator=NoUploads(),
        )
        with pytest.raises(ServeError, match=f"--port {port}: .* in use"):
            await app.start()
