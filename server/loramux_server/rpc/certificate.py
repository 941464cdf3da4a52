"""Files of the listener's certificate: read, and proved by a handshake in memory before any client meets them."""

import ssl
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

_BEGIN = b"-----BEGIN CERTIFICATE-----"
_END = "-----END CERTIFICATE-----"
_MAX_BYTES = 1024 * 1024
_TRIES = 5
_OPEN_TO_OTHERS = stat.S_IROTH | stat.S_IWOTH
# X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which `ssl` has no name for: the date is ours to judge.
_NO_CHECK_TIME = 0x200000
# Object identifiers of keys as they stand in a certificate, DER. OpenSSL takes them all, gRPC does not.
_ED448 = bytes.fromhex("06032b6571")
_REFUSED_BY_CLIENTS = {"Ed25519": bytes.fromhex("06032b6570"), "P-521": bytes.fromhex("06052b81040023")}

Contents = tuple[bytes, bytes, bytes | None]


class CertificateError(Exception):
    """Files that cannot serve; the message names setting, file and way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFiles:
    """Where certificate and key lie, all PEM.

    Attributes:
        cert: Certificate of the server, then those between it and its authority.
        key: Its private key, not encrypted.
        client_ca: Authorities of clients, which must then show a certificate; None asks for none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> Contents:
        """Read chain, key and client authorities.

        Raises:
            CertificateError: One of them is missing, unreadable or too large.
        """
        client_ca = None if self.client_ca is None else _read("--tls-client-ca", self.client_ca)
        return _read("--tls-cert", self.cert), _read("--tls-key", self.key), client_ca


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A chain and a key that belong together.

    Attributes:
        contents: Bytes of chain, key and client authorities.
        not_before: Valid from; Unix time.
        not_after: Valid until; Unix time.
        serial: Serial number in hexadecimal digits.
        warnings: What an operator should change though it serves.
    """

    contents: Contents = field(repr=False)
    not_before: float
    not_after: float
    serial: str
    warnings: Sequence[str]

    def shown(self) -> str:
        """Serial number and end, for a log line."""
        return f"serial {self.serial}, valid until {_date(self.not_after)}"


def load_certificate(files: CertificateFiles, *, allow_expired: bool) -> Certificate:
    """Read the files and check that they can serve.

    Args:
        files: Where they lie.
        allow_expired: Take an expired certificate, with a warning.

    Raises:
        CertificateError: They cannot.
    """
    before = files.read()
    for _ in range(_TRIES):
        failure: CertificateError | None = None
        found: Certificate | None = None
        try:
            found = _checked(files, before, allow_expired=allow_expired)
        except CertificateError as error:
            failure = error
        # The library reads a key from its path only: what was checked is what was read if it is still there. It also
        # tells a file caught between the two steps of its replacement from one that is bad.
        after = files.read()
        if after != before:
            before = after
        elif found is not None:
            return found
        elif failure is not None:
            raise failure
    raise CertificateError(f"--tls-cert {files.cert} and --tls-key {files.key} change faster than they can be read")


def _read(flag: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise CertificateError(f"{flag} {path} does not exist; give a PEM file") from None
    except OSError as error:
        raise CertificateError(
            f"{flag} {path} cannot be read: {error.strerror}; give a PEM file that this user may read"
        ) from error
    if len(content) > _MAX_BYTES:
        raise CertificateError(f"{flag} {path} has more than {_MAX_BYTES} bytes; give a PEM file")
    return content


def _checked(files: CertificateFiles, contents: Contents, *, allow_expired: bool) -> Certificate:
    chain, key, client_ca = contents
    chain_text = _certificates("--tls-cert", files.cert, chain)
    if b"PRIVATE KEY-----" not in key:
        raise CertificateError(f"--tls-key {files.key} holds no PEM private key (`-----BEGIN PRIVATE KEY-----`)")
    if _ED448 in _first(chain_text):
        raise CertificateError(f"--tls-cert {files.cert} is of an Ed448 key; use RSA, EC P-256 or EC P-384")
    if client_ca is not None:
        assert files.client_ca is not None
        _certificates("--tls-client-ca", files.client_ca, client_ca)
    served = _shake_hands(files, _context(files), chain_text)
    not_before, not_after = (ssl.cert_time_to_seconds(str(served[name])) for name in ("notBefore", "notAfter"))
    warnings = list(_warnings(files, chain_text, not_before))
    if not_after <= time.time():
        expired = f"--tls-cert {files.cert} expired on {_date(not_after)}: clients refuse it; replace the file"
        if not allow_expired:
            raise CertificateError(expired)
        warnings.append(expired)
    return Certificate(
        contents=contents,
        not_before=not_before,
        not_after=not_after,
        serial=str(served["serialNumber"]),
        warnings=tuple(warnings),
    )


def _certificates(flag: str, path: Path, content: bytes) -> str:
    """Return the text of a file of certificates that can all be parsed."""
    if _BEGIN not in content:
        raise CertificateError(f"{flag} {path} holds no PEM certificate (`{_BEGIN.decode()}`)")
    # Anything may stand between certificates, in any encoding.
    text = content.decode("ascii", "backslashreplace")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError) as error:
        raise CertificateError(f"{flag} {path} holds a damaged certificate: {_reason(error)}; write it anew") from error
    return text


def _context(files: CertificateFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def refuse() -> str:
        # Without a callback the library asks on the terminal.
        raise CertificateError(
            f"--tls-key {files.key} is encrypted; give one that is not, as `openssl pkey -in OLD -out NEW` writes it"
        )

    try:
        context.load_cert_chain(files.cert, files.key, password=refuse)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if "MISMATCH" in reason or reason == "NO_CERTIFICATE_ASSIGNED":
            raise CertificateError(
                f"--tls-key {files.key} does not belong to the first certificate of --tls-cert {files.cert}; give the "
                "key it was issued for, and the server's own certificate before those of its authorities"
            ) from error
        if reason:
            raise CertificateError(
                f"--tls-cert {files.cert} with --tls-key {files.key} is refused: {_reason(error)}; use RSA of 2,048 "
                "bits or more, or EC P-256 or P-384"
            ) from error
        raise CertificateError(
            f"--tls-key {files.key} holds a damaged private key, or of a kind that is not known; use RSA, EC P-256 "
            "or EC P-384"
        ) from error
    except OSError as error:  # it went away since it was read
        raise CertificateError(f"--tls-key {files.key} cannot be read: {error.strerror}") from error
    return context


def _shake_hands(files: CertificateFiles, server: ssl.SSLContext, chain: str) -> dict[str, object]:
    """Let a client in memory, which trusts the chain, take the certificate; return what it saw of it.

    It proves that the key signs and that the certificate may be a server's, and `ssl` decodes only certificates that
    came from a peer.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    context.load_verify_locations(cadata=chain)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        context.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    finished: set[ssl.SSLObject] = set()
    try:
        while len(finished) < len(ends):
            waiting = to_server.pending, to_client.pending
            for end in ends:
                try:
                    end.do_handshake()
                    finished.add(end)
                except ssl.SSLWantReadError:
                    continue
            assert len(finished) == len(ends) or waiting != (to_server.pending, to_client.pending), "a handshake stalls"
    except ssl.SSLError as error:
        raise CertificateError(
            f"--tls-cert {files.cert}: no client can accept it: {_reason(error)}; use a certificate for servers with "
            "an RSA, EC P-256 or EC P-384 key"
        ) from error
    seen = ends[0].getpeercert()
    assert seen, "a verified peer has a certificate"
    return dict(seen)


def _first(chain: str) -> bytes:
    """Return the first certificate in DER."""
    begin, end = _BEGIN.decode(), _END
    return ssl.PEM_cert_to_DER_cert(chain[chain.index(begin) :].partition(end)[0] + end)


def _warnings(files: CertificateFiles, chain: str, not_before: float) -> Iterator[str]:
    if not_before > time.time():
        yield f"--tls-cert {files.cert} is valid from {_date(not_before)} only: clients refuse it until then"
    for kind, identifier in _REFUSED_BY_CLIENTS.items():
        if identifier in _first(chain):
            yield (
                f"--tls-cert {files.cert} is of the kind {kind}, which gRPC's clients in Python and C++ do not accept; "
                "use RSA, EC P-256 or EC P-384"
            )
    try:
        mode = files.key.stat().st_mode
    except OSError as error:
        raise CertificateError(f"--tls-key {files.key} cannot be read: {error.strerror}") from error
    if mode & _OPEN_TO_OTHERS:
        yield (
            f"--tls-key {files.key} is open to every user of this machine (mode {stat.S_IMODE(mode):04o}); "
            "`chmod o= FILE` closes it"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error).partition(" (_ssl")[0]


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
