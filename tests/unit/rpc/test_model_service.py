import pytest

from loramux.v1 import model_pb2 as pb
from loramux_server.errors import Reason, Unavailable
from loramux_server.rpc.call import Call
from loramux_server.rpc.model_service import SERVICE, ModelService
from loramux_server.tenancy.access import LOCAL, Access


class FakeReplica:
    def __init__(self) -> None:
        self.ready = True
        self.state = pb.ServerStatus(
            replica_id="r1",
            state=pb.SERVER_STATE_SERVING,
            total=pb.ReplicaLoad(running_requests=3),
            tenants=[pb.TenantLoad(tenant="acme")],
        )

    def model(self) -> pb.Model:
        if not self.ready:
            raise Unavailable(Reason.ENGINE_UNAVAILABLE, "starting")
        return pb.Model(name="tiny", vocab_size=7)

    def status(self, tenant: str) -> pb.ServerStatus:
        self.state.own.tenant = tenant
        return self.state


def call(principal: str = LOCAL.name) -> Call:
    return Call(tenant="default", principal=principal, correlation_id="c", deadline=None)


def test_every_rpc_has_a_handler() -> None:
    methods = ModelService(FakeReplica(), Access()).methods()
    descriptor = pb.DESCRIPTOR.services_by_name["ModelService"]
    assert set(methods) == {f"/{SERVICE}/{method.name}" for method in descriptor.methods}
    assert all(method.kind == "unary_unary" for method in methods.values())


async def test_the_model_is_described_once_an_engine_is_there() -> None:
    replica = FakeReplica()
    service = ModelService(replica, Access())
    assert (await service.GetModel(pb.GetModelRequest(), call())).model.name == "tiny"
    replica.ready = False
    with pytest.raises(Unavailable):
        await service.GetModel(pb.GetModelRequest(), call())


async def test_totals_and_other_tenants_are_for_operators() -> None:
    replica = FakeReplica()
    service = ModelService(replica, Access())
    full = (await service.GetServerStatus(pb.GetServerStatusRequest(), call())).status
    assert full.total.running_requests == 3 and full.tenants and full.own.tenant == "default"
    own = (await service.GetServerStatus(pb.GetServerStatusRequest(), call("other"))).status
    assert not own.HasField("total") and not own.tenants and own.own.tenant == "default"
    assert replica.state.HasField("total"), "the replica's own message is left alone"
