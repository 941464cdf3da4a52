import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from loramux.v1 import adapter_pb2, generation_pb2, model_pb2
from loramux_server.errors import AccessDenied
from loramux_server.tenancy.access import POLICIES, TENANT_METADATA, Access, Policy, Principal, Role

FILES = (
    adapter_pb2.DESCRIPTOR,
    generation_pb2.DESCRIPTOR,
    model_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)
METHODS = sorted(
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
)


def test_the_descriptors_were_walked() -> None:
    assert "/loramux.v1.GenerationService/Generate" in METHODS and len(METHODS) > 25


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_policy(method: str) -> None:
    assert method in POLICIES


def test_every_policy_of_ours_has_a_method() -> None:
    ours = {name for name in POLICIES if name.startswith("/loramux.")}
    assert ours == {name for name in METHODS if name.startswith("/loramux.")}


def test_health_alone_is_exempt() -> None:
    exempt = {name for name, policy in POLICIES.items() if policy is Policy.EXEMPT}
    assert all(name.startswith("/grpc.health.v1.Health/") for name in exempt) and exempt


def test_without_credentials_everybody_acts_for_the_default_tenant() -> None:
    acting = Access().authorize("/loramux.v1.AdapterService/UpdateAdapter", {})
    assert (acting.tenant, acting.principal) == ("default", "local")
    assert Access().authorize("/loramux.v1.ModelService/GetModel", {TENANT_METADATA: "default"}).tenant == "default"
    assert Access().is_operator("local") and not Access().is_operator("other")


@pytest.mark.parametrize("tenant", ["acme", "", "DEFAULT", "../default"])
def test_another_tenant_is_refused_without_its_name(tenant: str) -> None:
    with pytest.raises(AccessDenied) as caught:
        Access().authorize("/loramux.v1.GenerationService/Generate", {TENANT_METADATA: tenant})
    assert "acme" not in caught.value.message


@pytest.mark.parametrize(
    "method", ["/loramux.v1.AdapterService/Nothing", "", "/x/y", "loramux.v1.ModelService/GetModel"]
)
def test_a_method_without_a_policy_is_refused(method: str) -> None:
    with pytest.raises(AccessDenied):
        Access().authorize(method, {})


def test_roles_decide() -> None:
    access = Access(Principal(name="bot", tenants=frozenset({"acme", "b"}), roles=frozenset({Role.GENERATE})))
    acme = {TENANT_METADATA: "acme"}
    assert access.authorize("/loramux.v1.GenerationService/Generate", acme).tenant == "acme"
    access.authorize("/loramux.v1.AdapterService/GetAdapter", acme)
    with pytest.raises(AccessDenied, match="lacks a role"):
        access.authorize("/loramux.v1.AdapterService/UpdateAdapter", acme)
    with pytest.raises(AccessDenied, match="several tenants"):
        access.authorize("/loramux.v1.GenerationService/Generate", {})
    assert not access.is_operator("bot")
