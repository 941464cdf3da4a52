"""What gRPC says of a connection that never came to be, in words that name the way out."""

from __future__ import annotations

# Only then did the connection fail before any call ran on it.
_NO_CONNECTION = "failed to connect to all addresses"
_OWN_CERTIFICATE = "TLSConfig(private_key=..., certificate_chain=...)"

_OF_HANDSHAKES = (
    ("WRONG_VERSION_NUMBER", "the server does not speak TLS there; use tls=False if it is meant to be plaintext"),
    (
        "CERTIFICATE_VERIFY_FAILED: certificate has expired",
        "the server's certificate has expired; it has to be replaced there",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is not trusted; give its authority with TLSConfig(root_certificates=...)",
    ),
    (
        "Hostname Verification Check failed",
        "the server's certificate is for another name; connect to one that it holds, or give that with "
        "TLSConfig(server_name=...)",
    ),
    (
        "Failed to create security handshaker",
        "a PEM text of TLSConfig cannot be used; check root_certificates, private_key and certificate_chain",
    ),
)
_CLOSED = ("Socket closed", "Connection reset by peer", "Broken pipe")


def connection_hint(message: str, *, tls: bool | None) -> str | None:
    """Say what is wrong between this client and the server; None if that cannot be told.

    Args:
        message: Status text that gRPC made on this side.
        tls: Whether the client uses TLS; None if that is not known.
    """
    if _NO_CONNECTION not in message:
        return None
    for sign, hint in _OF_HANDSHAKES:
        if sign in message:
            return hint
    if tls is None or not any(sign in message for sign in _CLOSED):
        return None
    if tls:
        return (
            "the server closed the connection during the TLS handshake; it may ask for a client certificate, or for "
            f"one of another authority: {_OWN_CERTIFICATE}"
        )
    return (
        "the server closed the connection at once; it may ask for TLS, which this client does not use: give tls=True "
        "or a TLSConfig"
    )
