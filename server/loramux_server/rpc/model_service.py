"""`loramux.v1.ModelService`: the served base model and the state of this replica."""

from collections.abc import Mapping
from typing import Protocol

from loramux.v1 import model_pb2 as pb
from loramux_server.rpc.call import Call, Method

SERVICE = "loramux.v1.ModelService"


class Replica(Protocol):
    """What the servicer asks the running server."""

    def model(self) -> pb.Model:
        """Describe the base model.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE, no engine has reported it yet.
        """
        ...

    def status(self, tenant: str) -> pb.ServerStatus:
        """Describe this replica: `own` for one tenant, `total` and `tenants` filled in."""
        ...


class Operators(Protocol):
    """Who sees totals and other tenants."""

    def is_operator(self, principal: str) -> bool:
        """Whether a principal has the operator role."""
        ...


class ModelService:
    """The servicer; see the .proto for what each RPC does.

    Args:
        replica: Facts of the running server.
        operators: Decides who sees totals; `tenancy.access.Access` does.
    """

    def __init__(self, replica: Replica, operators: Operators) -> None:
        self._replica = replica
        self._operators = operators

    def methods(self) -> Mapping[str, Method]:
        """List the handlers by full method name."""
        return {
            f"/{SERVICE}/GetModel": Method(request_type=pb.GetModelRequest, handler=self.GetModel, kind="unary_unary"),
            f"/{SERVICE}/GetServerStatus": Method(
                request_type=pb.GetServerStatusRequest, handler=self.GetServerStatus, kind="unary_unary"
            ),
        }

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        """Describe the base model."""
        return pb.GetModelResponse(model=self._replica.model())

    async def GetServerStatus(self, request: pb.GetServerStatusRequest, call: Call) -> pb.GetServerStatusResponse:
        """Describe this replica; totals and other tenants go to operators only."""
        status = pb.ServerStatus()
        status.CopyFrom(self._replica.status(call.tenant))
        if not self._operators.is_operator(call.principal):
            status.ClearField("total")
            status.ClearField("tenants")
        return pb.GetServerStatusResponse(status=status)
