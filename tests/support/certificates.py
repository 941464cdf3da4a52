"""Throw-away certificates as files, and what a listener shows of its own."""

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519

from loramux import TLSConfig
from loramux_server.rpc.certificate import CertificateFiles

PAST = datetime(2020, 1, 2, 3, 4, tzinfo=UTC)


def issue(ca: trustme.CA, *, expired: bool = False) -> trustme.LeafCert:
    """Issue a certificate of this machine."""
    if expired:
        return ca.issue_cert("localhost", not_before=PAST - timedelta(days=9), not_after=PAST)
    return ca.issue_cert("localhost")


def pems(certificate: trustme.LeafCert) -> tuple[bytes, bytes]:
    """Chain and key."""
    return b"".join(pem.bytes() for pem in certificate.cert_chain_pems), certificate.private_key_pem.bytes()


def write_pair(directory: Path, certificate: trustme.LeafCert, *, key: bytes | None = None) -> CertificateFiles:
    """Write tls.crt and tls.key, each by rename; `key` stands for the one that belongs."""
    directory.mkdir(exist_ok=True, parents=True)
    files = CertificateFiles(cert=directory / "tls.crt", key=directory / "tls.key")
    chain, own = pems(certificate)
    for path, content in ((files.cert, chain), (files.key, own if key is None else key)):
        fresh = path.with_suffix(".new")
        fresh.touch(mode=0o600)
        fresh.write_bytes(content)
        fresh.rename(path)
    return files


def self_signed(files: CertificateFiles, key: Any, *, usage: x509.ObjectIdentifier | None = None) -> None:
    """Write a certificate of any key, for servers unless `usage` says otherwise."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    bare = isinstance(key, ed448.Ed448PrivateKey | ed25519.Ed25519PrivateKey)
    issued = builder.sign(key, None if bare else hashes.SHA256())
    files.cert.write_bytes(issued.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files.key.write_bytes(key.private_bytes(*pem))


class Mount:
    """A mounted secret as Kubernetes keeps it: one symlink, changed at once, is what all files go through."""

    def __init__(self, root: Path, certificate: trustme.LeafCert) -> None:
        self._root = root
        self._count = 0
        root.mkdir()
        self.put(certificate)
        self.files = CertificateFiles(cert=root / "tls.crt", key=root / "tls.key")
        for name in ("tls.crt", "tls.key"):
            (root / name).symlink_to(Path("..data") / name)

    def put(self, certificate: trustme.LeafCert, *, key: bytes | None = None) -> None:
        """Replace the pair; `key` stands for the one that belongs."""
        self._count += 1
        write_pair(self._root / f"..{self._count}", certificate, key=key)
        (self._root / "..data_tmp").symlink_to(f"..{self._count}")
        (self._root / "..data_tmp").rename(self._root / "..data")


def settings(files: CertificateFiles) -> dict[str, Any]:
    """Settings of a server with these files."""
    given = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.client_ca}
    return {name: str(path) for name, path in given.items() if path is not None}


def trusting(ca: trustme.CA, own: trustme.LeafCert | None = None) -> TLSConfig:
    """Settings of a client that trusts `ca` and shows `own`."""
    chain, key = (None, None) if own is None else pems(own)
    return TLSConfig(root_certificates=ca.cert_pem.bytes(), certificate_chain=chain, private_key=key)


def serial(certificate: trustme.LeafCert) -> str:
    """Serial number, as `ssl` writes it: whole bytes, without those in front that are zero."""
    number = x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes()).serial_number
    return number.to_bytes((number.bit_length() + 7) // 8, "big").hex().upper()


def shown_serial(port: int, ca: trustme.CA) -> str:
    """Serial number of what a listener shows to a new connection."""
    context = ssl.create_default_context(cadata=ca.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return str((connection.getpeercert() or {})["serialNumber"])
