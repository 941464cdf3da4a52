"""Addresses, TLS and credential rules, metadata, timeouts."""

import math
from typing import Any

import pytest

from loramux import AsyncClient, Client, InvalidRequest, TLSConfig
from loramux._connection import View, call_metadata, checked_timeout, connection, is_loopback
from loramux._version import __version__


def connect(address: str, **values: Any) -> Any:
    given: dict[str, Any] = {"has_token": False, "tls": None, "allow_plaintext_token": False, "options": ()}
    return connection(address, **(given | values))


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:50051", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("[::1]:50051", True),
        ("unix:/run/loramux.sock", True),
        ("unix:///run/loramux.sock", True),
        ("unix-abstract:loramux", True),
        ("dns:///localhost:50051", True),
        ("dns:localhost:50051", True),
        ("ipv4:127.0.0.1:5,127.0.0.2:6", True),
        ("ipv6:[::1]:50051", True),
        ("ipv4:127.0.0.1:5,10.0.0.1:6", False),
        ("10.0.0.1:50051", False),
        ("[2001:db8::1]:50051", False),
        ("loramux.example:443", False),
        ("localhost.example:443", False),
        ("127.0.0.1.example:443", False),
        ("dns:///loramux.example:443", False),
        ("xds:///localhost", False),
    ],
)
def test_what_is_this_machine(address: str, local: bool) -> None:
    assert is_loopback(address) is local
    assert (connect(address).tls is None) is local


def test_a_timeout_that_no_clock_holds_is_no_limit() -> None:
    assert checked_timeout(1e300, None) is None
    assert checked_timeout(366 * 24 * 3600.0, None) == 366 * 24 * 3600.0
    assert checked_timeout(None, 1e12) is None


class TestTLS:
    def test_a_token_never_goes_over_the_net_in_clear(self) -> None:
        with pytest.raises(InvalidRequest, match="in clear"):
            connect("loramux.example:80", has_token=True, tls=False)
        assert connect("loramux.example:80", has_token=True, tls=False, allow_plaintext_token=True).tls is None
        assert connect("loramux.example:80", tls=False).tls is None
        assert connect("localhost:80", has_token=True).tls is None
        assert connect("loramux.example:443", has_token=True).tls == TLSConfig()

    @pytest.mark.parametrize("cls", [Client, AsyncClient])
    def test_clients_ask_for_it(self, cls: type[Client] | type[AsyncClient]) -> None:
        with pytest.raises(InvalidRequest, match="in clear"):
            cls("loramux.example:80", token="t", tls=False)

    def test_settings(self) -> None:
        config = TLSConfig(server_name="other.example")
        options = dict(connect("10.0.0.1:1", tls=config).options)
        assert options["grpc.ssl_target_name_override"] == "other.example"
        assert connect("localhost:1", tls=True).credentials() is not None
        with pytest.raises(InvalidRequest, match="both"):
            TLSConfig(private_key=b"-----BEGIN PRIVATE KEY-----")
        secret = TLSConfig(private_key=b"-----BEGIN secret", certificate_chain=b"-----BEGIN CERTIFICATE-----")
        assert "secret" not in repr(secret)

    @pytest.mark.parametrize("name", ["root_certificates", "private_key", "certificate_chain"])
    @pytest.mark.parametrize("value", [b"/etc/ca.pem", "-----BEGIN CERTIFICATE-----"])
    def test_what_is_no_pem_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidRequest, match=f"{name} must be the bytes of a PEM file"):
            TLSConfig(**{name: value})


class TestOptions:
    def test_defaults(self) -> None:
        options = dict(connect("loramux.example:443").options)
        assert options["grpc.enable_retries"] == 0
        assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == 4 * 1024 * 1024
        assert options["grpc.primary_user_agent"] == f"loramux-python/{__version__}"
        assert options["grpc.lb_policy_name"] == "round_robin"
        assert options["grpc.keepalive_time_ms"] > options["grpc.keepalive_timeout_ms"]

    def test_the_callers_win(self) -> None:
        options = connect("localhost:1", options=[("grpc.keepalive_time_ms", 5), ("x.y", "z")]).options
        assert dict(options)["grpc.keepalive_time_ms"] == 5
        assert len(dict(options)) == len(options)
        assert ("x.y", "z") in options


@pytest.mark.parametrize("address", ["", "https://loramux.example", "http://localhost:1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        connect(address)


@pytest.mark.parametrize("token", ["", "two words", "umläut", "new\nline", "x" * 4097, 5])
def test_tokens_that_cannot_be_sent_are_refused_and_not_shown(token: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client("localhost:1", token=token)
    if isinstance(token, str) and token:
        assert token not in str(caught.value)


def test_metadata() -> None:
    view = View(tenant="acme", adapter="bot", min_revision=7)
    assert call_metadata(view, token="t", request_id="r") == [
        ("x-request-id", "r"),
        ("authorization", "Bearer t"),
        ("x-loramux-tenant", "acme"),
        ("min_revision", "7"),
    ]
    assert call_metadata(View(), token=None, request_id="r") == [("x-request-id", "r")]


class TestTimeouts:
    def test_of_the_call_or_else_of_the_client(self) -> None:
        assert checked_timeout(None, 60.0) == 60.0
        assert checked_timeout(5, 60.0) == 5.0
        assert checked_timeout(math.inf, 60.0) is None
        assert checked_timeout(None, None) is None

    @pytest.mark.parametrize("timeout", [0, -1.0, math.nan, True, "5"])
    def test_refused(self, timeout: Any) -> None:
        with pytest.raises(InvalidRequest, match="timeout"):
            checked_timeout(timeout, 60.0)


@pytest.mark.parametrize("cls", [Client, AsyncClient])
class TestViews:
    def test_are_immutable_and_share_the_connection(self, cls: type[Client] | type[AsyncClient]) -> None:
        client = cls("localhost:1")
        view = client.for_tenant("acme").with_adapter("bot").with_min_revision(3)
        assert type(view) is cls
        assert view._transport is client._transport
        assert client._view == View()
        assert view._view == View(tenant="acme", adapter="bot", min_revision=3)
        assert view.with_adapter(None)._view == View(tenant="acme", min_revision=3)

    def test_refuse_what_is_no_metadata(self, cls: type[Client] | type[AsyncClient]) -> None:
        client = cls("localhost:1")
        for tenant in ("", "a\nb", "ü", "x" * 257):
            with pytest.raises(InvalidRequest, match="tenant"):
                client.for_tenant(tenant)
        with pytest.raises(InvalidRequest, match="adapter"):
            client.with_adapter("")
        with pytest.raises(InvalidRequest, match="revision"):
            client.with_min_revision(-1)
