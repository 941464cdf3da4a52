"""Files of the listener's certificate: what is refused and how, what is warned of, and when a new pair is taken."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trustme", reason="trustme is not installed: pip install 'loramux[dev]'")

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from loramux_server.rpc import certificate
from loramux_server.rpc.certificate import CertificateError, CertificateFiles, load_certificate
from loramux_server.rpc.tls import TlsRotation
from tests.support.certificates import PAST, Mount, issue, pems, self_signed, serial, write_pair

DAMAGED = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> CertificateFiles:
    return write_pair(tmp_path / "tls", issue(ca))


def load(files: CertificateFiles) -> certificate.Certificate:
    return load_certificate(files, allow_expired=True)


def test_a_good_pair(tmp_path: Path, ca: trustme.CA) -> None:
    issued = issue(ca)
    files = write_pair(tmp_path, issued)
    # Comments in any encoding are common between certificates.
    files.cert.write_bytes("# Größe\n".encode("latin-1") + files.cert.read_bytes())
    found = load(files)
    assert found.serial == serial(issued) and found.warnings == () and found.serial in found.shown()
    assert "PRIVATE" not in repr(found)


def test_an_intermediate_authority(tmp_path: Path, ca: trustme.CA) -> None:
    assert load(write_pair(tmp_path, issue(ca.create_child_ca()))).warnings == ()


def _other_key(files: CertificateFiles) -> None:
    files.key.write_bytes(pems(issue(trustme.CA()))[1])


def _swapped(files: CertificateFiles) -> None:
    chain, key = files.cert.read_bytes(), files.key.read_bytes()
    files.cert.write_bytes(key)
    files.key.write_bytes(chain)


def _kind(make: Callable[[], Any]) -> Callable[[CertificateFiles], None]:
    return lambda files: self_signed(files, make())


def _for_clients(files: CertificateFiles) -> None:
    self_signed(files, ec.generate_private_key(ec.SECP256R1()), usage=ExtendedKeyUsageOID.CLIENT_AUTH)


def _encrypted(files: CertificateFiles) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda files: files.cert.unlink(), ["--tls-cert", "tls.crt does not exist"]),
        (lambda files: files.key.unlink(), ["--tls-key", "tls.key does not exist"]),
        (lambda files: (files.key.unlink(), files.key.mkdir()), ["--tls-key", "tls.key cannot be read", "directory"]),
        (lambda files: files.cert.write_bytes(b""), ["--tls-cert", "tls.crt holds no PEM certificate"]),
        (lambda files: files.key.write_bytes(b"\x30\x82"), ["--tls-key", "tls.key holds no PEM private key"]),
        (lambda files: files.cert.write_bytes(bytes(2 * 1024 * 1024)), ["--tls-cert", "more than 1048576 bytes"]),
        (lambda files: files.cert.write_text(DAMAGED.format("CERTIFICATE")), ["--tls-cert", "damaged certificate"]),
        (lambda files: files.key.write_text(DAMAGED.format("PRIVATE KEY")), ["--tls-key", "damaged private key"]),
        (_swapped, ["--tls-cert", "tls.crt holds no PEM certificate"]),
        (_other_key, ["--tls-key", "does not belong to", "--tls-cert", "the key it was issued for"]),
        (_encrypted, ["--tls-key", "is encrypted", "openssl pkey"]),
        (_kind(lambda: rsa.generate_private_key(65537, 1024)), ["--tls-cert", "ee key too small", "2,048"]),
        (_kind(ed448.Ed448PrivateKey.generate), ["--tls-cert", "Ed448", "use RSA"]),
        (_kind(lambda: ec.generate_private_key(ec.BrainpoolP256R1())), ["--tls-cert", "no client can accept it"]),
        (_for_clients, ["--tls-cert", "no client can accept it", "purpose"]),
    ],
)
def test_what_cannot_serve_is_refused(
    files: CertificateFiles, spoil: Callable[[CertificateFiles], object], words: list[str]
) -> None:
    spoil(files)
    with pytest.raises(CertificateError) as error:
        load(files)
    assert all(word in str(error.value) for word in words), error.value
    assert "AAAA" not in str(error.value)


def test_client_authorities_are_checked_too(files: CertificateFiles, tmp_path: Path, ca: trustme.CA) -> None:
    authorities = tmp_path / "clients.pem"
    mutual = CertificateFiles(cert=files.cert, key=files.key, client_ca=authorities)
    for content, words in ((None, "does not exist"), (b"x", "holds no PEM certificate")):
        if content is not None:
            authorities.write_bytes(content)
        with pytest.raises(CertificateError, match=f"--tls-client-ca .*clients.pem {words}"):
            load(mutual)
    authorities.write_bytes(ca.cert_pem.bytes())
    assert load(mutual).contents[2] == ca.cert_pem.bytes()


def test_warnings(tmp_path: Path, ca: trustme.CA) -> None:
    files = write_pair(tmp_path, issue(ca, expired=True))
    files.key.chmod(0o644)
    found = load(files)
    assert found.not_after == PAST.timestamp()
    key, expired = found.warnings
    assert "tls.crt expired on 2020-01-02 03:04 UTC" in expired and "--tls-cert" in expired
    assert "tls.key is open to every user of this machine (mode 0644)" in key and "chmod o=" in key
    files.key.chmod(0o640)  # for a group, as key files of a service often are
    self_signed(files, ed25519.Ed25519PrivateKey.generate())
    (kind,) = load(files).warnings
    assert "Ed25519" in kind and "P-256" in kind
    write_pair(tmp_path, ca.issue_cert("localhost", not_before=PAST.replace(year=2400)))
    (early,) = load(files).warnings
    assert "valid from 2400-01-02" in early


def test_files_caught_in_their_replacement_are_read_again(
    files: CertificateFiles, ca: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacement = issue(ca)
    real, seen = certificate._checked, []

    def replaced_meanwhile(*arguments: object, **options: bool) -> certificate.Certificate:
        if not seen:
            write_pair(files.cert.parent, replacement)
        seen.append(arguments)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(certificate, "_checked", replaced_meanwhile)
    found = load(files)
    assert len(seen) == 2 and found.serial == serial(replacement) and found.contents[:2] == pems(replacement)


class TestRotation:
    async def test_a_new_pair_is_taken(self, tmp_path: Path, ca: trustme.CA) -> None:
        mount = Mount(tmp_path / "mount", issue(ca))
        rotation = TlsRotation(mount.files)
        first = rotation.certificate
        await rotation.refresh()
        assert rotation.certificate is first and rotation.stats().reloads == 0
        second = issue(ca)
        mount.put(second)
        await rotation.refresh()
        assert rotation.certificate.serial == serial(second) != first.serial
        assert rotation.stats().reloads == 1 and not rotation.stats().stale

    async def test_a_broken_pair_is_reported_once_and_not_taken(
        self, files: CertificateFiles, ca: trustme.CA, caplog: pytest.LogCaptureFixture
    ) -> None:
        rotation = TlsRotation(files)
        first = rotation.certificate
        with caplog.at_level(logging.ERROR):
            files.key.write_bytes(pems(issue(ca))[1])
            await rotation.refresh()
            # Whoever replaces two files one after the other is given the time to.
            assert not rotation.stats().stale and not caplog.records
            for _ in range(3):
                await rotation.refresh()
            assert rotation.stats().stale and rotation.certificate is first
            (record,) = caplog.records
            assert "--tls-key" in record.getMessage() and first.serial in record.getMessage()
            files.cert.unlink()
            for _ in range(3):
                await rotation.refresh()
            assert len(caplog.records) == 2 and "does not exist" in caplog.records[1].getMessage()
        write_pair(files.cert.parent, issue(ca))
        await rotation.refresh()
        assert not rotation.stats().stale and rotation.stats().reloads == 1 and rotation.certificate is not first

    async def test_the_old_files_put_back_end_the_alarm(self, files: CertificateFiles) -> None:
        rotation = TlsRotation(files)
        key = files.key.read_bytes()
        files.key.write_bytes(b"")
        for _ in range(2):
            await rotation.refresh()
        assert rotation.stats().stale
        files.key.write_bytes(key)
        await rotation.refresh()
        assert not rotation.stats().stale and rotation.stats().reloads == 0

    async def test_an_expired_one_serves_at_the_start_only(self, tmp_path: Path, ca: trustme.CA) -> None:
        files = write_pair(tmp_path, issue(ca, expired=True))
        assert TlsRotation(files).stats().expires == PAST.timestamp()
        write_pair(tmp_path, issue(ca))
        rotation = TlsRotation(files)
        first = rotation.certificate
        write_pair(tmp_path, issue(ca, expired=True))
        for _ in range(2):
            await rotation.refresh()
        assert rotation.certificate is first and rotation.stats().stale
