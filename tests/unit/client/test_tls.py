"""TLS over a real channel: certificates checked, mutual TLS, names."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

pytest.importorskip("trustme", reason="trustme is not installed: pip install 'loramux[dev]'")

import trustme

from loramux import AsyncClient, Client, RetryPolicy, TLSConfig, Unavailable
from loramux.v1 import model_pb2

ONCE = RetryPolicy(max_attempts=1)
seen: list[str] = []


def handler() -> grpc.GenericRpcHandler:
    def get_model(request: model_pb2.GetModelRequest, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        seen.append(dict(context.invocation_metadata()).get("authorization", ""))
        return model_pb2.GetModelResponse(model=model_pb2.Model(name="tls"))

    method = grpc.unary_unary_rpc_method_handler(
        get_model, model_pb2.GetModelRequest.FromString, model_pb2.GetModelResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler("loramux.v1.ModelService", {"GetModel": method})


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def serve(ca: trustme.CA, name: str, *, mutual: bool) -> Iterator[str]:
    certificate = ca.issue_cert(name)
    credentials = grpc.ssl_server_credentials(
        [(certificate.private_key_pem.bytes(), b"".join(p.bytes() for p in certificate.cert_chain_pems))],
        root_certificates=ca.cert_pem.bytes() if mutual else None,
        require_client_auth=mutual,
    )
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((handler(),))
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield f"localhost:{port}"
        server.stop(None).wait()


@pytest.fixture
def address(ca: trustme.CA) -> Iterator[str]:
    yield from serve(ca, "localhost", mutual=False)


@pytest.fixture
def mutual_address(ca: trustme.CA) -> Iterator[str]:
    yield from serve(ca, "localhost", mutual=True)


@pytest.fixture
def named_address(ca: trustme.CA) -> Iterator[str]:
    yield from serve(ca, "loramux.example", mutual=False)


async def test_both_clients(ca: trustme.CA, address: str) -> None:
    tls = TLSConfig(root_certificates=ca.cert_pem.bytes())
    with Client(address, tls=tls, token="secret") as client:
        assert client.model().name == "tls"
    async with AsyncClient(address, tls=tls, token="secret") as async_client:
        assert (await async_client.model()).name == "tls"
    assert seen[-2:] == ["Bearer secret", "Bearer secret"]


def test_an_unknown_authority_is_refused(address: str) -> None:
    other = TLSConfig(root_certificates=trustme.CA().cert_pem.bytes())
    with Client(address, tls=other, retry=ONCE) as client, pytest.raises(Unavailable):
        client.model()


def test_plaintext_to_a_tls_port_fails(address: str) -> None:
    with Client(address, tls=False, retry=ONCE) as client, pytest.raises(Unavailable):
        client.model()


def test_mutual(ca: trustme.CA, mutual_address: str) -> None:
    own = ca.issue_cert("client")
    with Client(
        mutual_address,
        tls=TLSConfig(
            root_certificates=ca.cert_pem.bytes(),
            private_key=own.private_key_pem.bytes(),
            certificate_chain=b"".join(pem.bytes() for pem in own.cert_chain_pems),
        ),
    ) as client:
        assert client.model().name == "tls"
    nobody = TLSConfig(root_certificates=ca.cert_pem.bytes())
    with Client(mutual_address, tls=nobody, retry=ONCE) as client, pytest.raises(Unavailable):
        client.model()


def test_another_name(ca: trustme.CA, named_address: str) -> None:
    root = ca.cert_pem.bytes()
    with Client(named_address, tls=TLSConfig(root_certificates=root), retry=ONCE) as client, pytest.raises(Unavailable):
        client.model()
    with Client(named_address, tls=TLSConfig(root_certificates=root, server_name="loramux.example")) as client:
        assert client.model().name == "tls"
