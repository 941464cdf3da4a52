"""Where and how a client connects: address, TLS, credential rules, channel options, metadata of a call."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import grpc

from loramux._errors import InvalidRequest
from loramux._requests import MAX_MESSAGE_BYTES, invalid
from loramux._version import __version__

_SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "xds")
MAX_TOKEN_BYTES = 4096

ChannelOption = tuple[str, str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TLSConfig:
    """How to connect with TLS; all PEM. A new certificate needs a new client: gRPC reads them once.

    Attributes:
        root_certificates: Authorities to trust; None takes gRPC's own list.
        private_key: Key of the client, for mutual TLS.
        certificate_chain: Certificate of the client, for mutual TLS.
        server_name: Name to check the server's certificate against; None takes the address.

    Raises:
        InvalidRequest: Only one of private_key and certificate_chain is given, or one is no PEM text in bytes.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        """Check the texts, and that key and certificate come together."""
        for name in ("root_certificates", "private_key", "certificate_chain"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, bytes) or b"-----BEGIN " not in value):
                raise InvalidRequest(f"{name} must be the bytes of a PEM file, which hold `-----BEGIN `")
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InvalidRequest("mutual TLS needs both private_key and certificate_chain")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the calls of one client object have in common.

    Attributes:
        tenant: Tenant to act for; None if the credential says it.
        adapter: Adapter of generations that name none; None for the tenant's default.
        min_revision: Registry revision that a replica must have seen; None for any.
    """

    tenant: str | None = None
    adapter: str | None = None
    min_revision: int | None = None

    def shown(self) -> str:
        """What is set, as further arguments in the `repr` of a client."""
        set_fields = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "".join(f", {name}={value!r}" for name, value in set_fields if value is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A checked target.

    Attributes:
        target: Target for gRPC.
        tls: TLS settings; None for plaintext.
        options: Channel options.
    """

    target: str
    tls: TLSConfig | None
    options: tuple[ChannelOption, ...]

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Build the channel credentials; None for plaintext."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            root_certificates=self.tls.root_certificates,
            private_key=self.tls.private_key,
            certificate_chain=self.tls.certificate_chain,
        )


def is_loopback(address: str) -> bool:
    """Whether `address` can only be this machine: localhost, 127.0.0.0/8, ::1 or a unix socket."""
    scheme, separator, rest = address.partition(":")
    if separator and scheme in ("unix", "unix-abstract"):
        return True
    if separator and scheme in _SCHEMES:
        if scheme == "xds":
            return False
        # dns://authority/name and ipv4:a:1,b:2: every one of several has to be local.
        address = rest.rpartition("/")[2]
    return all(_is_local_host(_host(part)) for part in address.split(","))


def _host(address: str) -> str:
    """Cut the port off."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, separator, port = address.rpartition(":")
    return host if separator and ":" not in host and port.isdecimal() else address


def _is_local_host(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def connection(
    address: str,
    *,
    has_token: bool,
    tls: bool | TLSConfig | None,
    allow_plaintext_token: bool,
    options: Sequence[ChannelOption],
) -> Connection:
    """Check where and how to connect.

    Args:
        address: `host:port` or a gRPC target.
        has_token: Whether calls carry a token.
        tls: True, False or settings; None is on for everything but this machine.
        allow_plaintext_token: Allows a token over plaintext to another machine.
        options: Channel options of the caller, which win over ours.

    Raises:
        InvalidRequest: The address is no target, or a token would go over the net in clear.
    """
    if not address or "://" in address and address.partition("://")[0] not in _SCHEMES:
        raise invalid("address", f"is {address!r}; it must be host:port or a gRPC target such as dns:///host:port")
    local = is_loopback(address)
    config: TLSConfig | None
    if tls is None:
        config = None if local else TLSConfig()
    elif isinstance(tls, TLSConfig):
        config = tls
    else:
        config = TLSConfig() if tls else None
    if has_token and config is None and not local and not allow_plaintext_token:
        raise invalid(
            "token",
            f"would go to {address} in clear; leave tls on, or allow_plaintext_token=True if the network is trusted",
        )
    ours: dict[str, str | int] = {
        # The SDK retries by itself: see _retry.
        "grpc.enable_retries": 0,
        "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
        "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
        "grpc.keepalive_time_ms": 60_000,
        "grpc.keepalive_timeout_ms": 20_000,
        # Keepalive alone does not notice a frozen peer.
        "grpc.http2.ping_timeout_ms": 20_000,
        # A queued request may be silent for long; pings must go on meanwhile.
        "grpc.http2.max_pings_without_data": 0,
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.min_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 10_000,
        "grpc.primary_user_agent": f"loramux-python/{__version__}",
    }
    if not local:
        ours["grpc.lb_policy_name"] = "round_robin"
    if config is not None and config.server_name is not None:
        ours["grpc.ssl_target_name_override"] = config.server_name
    ours.update(dict(options))
    return Connection(target=address, tls=config, options=tuple(ours.items()))


def checked_token(token: object) -> str:
    """Check a token without ever showing it.

    Raises:
        InvalidRequest: It is not 1 to 4,096 printable ASCII characters.
    """
    if not isinstance(token, str):
        raise invalid("token", f"is a {type(token).__name__}; it must be text, or a callable that returns text")
    if not 1 <= len(token) <= MAX_TOKEN_BYTES or not token.isascii() or not token.isprintable() or " " in token:
        raise invalid("token", f"must be 1 to {MAX_TOKEN_BYTES} printable ASCII characters without spaces")
    return token


def checked_id(name: str, value: str) -> str:
    """Check a text that goes into metadata.

    Raises:
        InvalidRequest: It is not 1 to 256 printable ASCII characters.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= 256 or not value.isascii() or not value.isprintable():
        raise invalid(name, "must be 1 to 256 printable ASCII characters")
    return value


def new_request_id() -> str:
    """Mint a correlation id."""
    return uuid.uuid4().hex


def call_metadata(view: View, *, token: str | None, request_id: str) -> list[tuple[str, str]]:
    """Build the metadata of a call."""
    metadata = [("x-request-id", request_id)]
    if token is not None:
        metadata.append(("authorization", f"Bearer {token}"))
    if view.tenant is not None:
        metadata.append(("x-loramux-tenant", view.tenant))
    if view.min_revision is not None:
        metadata.append(("min_revision", str(view.min_revision)))
    return metadata


# No deadline: gRPC's clock overflows long before a float does.
_LONGEST_TIMEOUT = 366 * 24 * 3600.0


def checked_timeout(timeout: float | None, default: float | None) -> float | None:
    """Return the seconds that a call may take; None for no limit.

    Args:
        timeout: Of the call; None takes the default; `math.inf`, like anything above a year, means no limit.
        default: Of the client.

    Raises:
        InvalidRequest: It is not a number above 0.
    """
    value = default if timeout is None else timeout
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise invalid("timeout", f"is {value!r}; it must be a number of seconds above 0, or math.inf for no limit")
    return None if value > _LONGEST_TIMEOUT else float(value)
