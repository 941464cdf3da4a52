"""The gRPC server: transport limits, keepalive, health, reflection, and the pipeline that serves our own methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from loramux_server.rpc.limits import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES
from loramux_server.rpc.pipeline import Pipeline
from loramux_server.rpc.standard_services import ParsingServer

# Their types ask for a server and know nothing of one that stands in for it.
_AddToServer = Callable[[object, ParsingServer], None]
_ADD_HEALTH = cast(_AddToServer, health_pb2_grpc.add_HealthServicer_to_server)
_ADD_REFLECTION = cast(_AddToServer, reflection_pb2_grpc.add_ServerReflectionServicer_to_server)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """Connection settings; times in seconds.

    Attributes:
        keepalive: Idle time before the server pings a client.
        ping_timeout: Time that a client has to answer any ping; keepalive alone does not notice a frozen client.
        min_ping_interval: Clients may ping an idle connection this often.
        handshake_timeout: Time that a connection has to become an HTTP/2 one.
        max_connection_age: Then the client is asked to reconnect, so that new replicas get their share.
        max_connection_age_grace: Time that running calls have after that.
        max_concurrent_rpcs: The last fence; admission is decided far below it.
    """

    keepalive: float = 30.0
    ping_timeout: float = 10.0
    min_ping_interval: float = 20.0
    handshake_timeout: float = 10.0
    max_connection_age: float = 600.0
    max_connection_age_grace: float = 3600.0
    max_concurrent_rpcs: int = 20_000

    def options(self) -> Sequence[tuple[str, int]]:
        """Render as gRPC channel arguments."""
        return (
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.keepalive_time_ms", int(self.keepalive * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.ping_timeout * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.ping_timeout * 1000)),
            # Above its own default of 1,000 gRPC resets calls at random, as CANCELLED without a reason: a burst that
            # arrives in one read would meet that before our queue, which refuses with a reason.
            ("grpc.server.max_pending_requests", self.max_concurrent_rpcs),
            ("grpc.server.max_pending_requests_hard_limit", self.max_concurrent_rpcs),
            ("grpc.http2.min_ping_interval_without_data_ms", int(self.min_ping_interval * 1000)),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_timeout * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_connection_age_ms", int(self.max_connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", int(self.max_connection_age_grace * 1000)),
            ("grpc.so_reuseport", 0),
        )


class PortInUse(Exception):
    """The address cannot be listened on; the message names it."""


class HealthState:
    """Health of every service by name, and of the server as a whole (the empty name)."""

    def __init__(self, services: Sequence[str]) -> None:
        """Start as NOT_SERVING.

        Args:
            services: Full service names.
        """
        self.servicer = health.aio.HealthServicer()
        self._services = ("", *services)

    async def set(self, serving: bool) -> None:
        """Tell all watchers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.servicer.set(service, status)

    async def drain(self) -> None:
        """Stay NOT_SERVING from now on."""
        await self.servicer.enter_graceful_shutdown()


class GrpcServer:
    """Our listener."""

    def __init__(
        self,
        pipeline: Pipeline,
        health_state: HealthState,
        services: Sequence[str],
        *,
        transport: Transport,
        reflect: bool,
    ) -> None:
        """Create a server that does not listen yet.

        Args:
            pipeline: Serves our own methods.
            health_state: Serves health.
            services: Full service names, for reflection.
            transport: Limits and keepalive.
            reflect: Whether to serve reflection.
        """
        self._server = grpc.aio.server(
            options=transport.options(), maximum_concurrent_rpcs=transport.max_concurrent_rpcs
        )
        self._server.add_generic_rpc_handlers((pipeline,))
        standard = ParsingServer(self._server)
        _ADD_HEALTH(health_state.servicer, standard)
        if reflect:
            names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            _ADD_REFLECTION(reflection.aio.ReflectionServicer(names), standard)

    async def start(self, host: str, port: int, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen.

        Args:
            host: Address; an IPv6 one without brackets.
            port: 0 picks one.
            credentials: For TLS; None = plaintext.

        Returns:
            The port.

        Raises:
            PortInUse: Something else listens there, or the address is not ours.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise PortInUse(f"{address} is in use or not an address of this machine") from error
        await self._server.start()
        return int(bound)

    async def stop(self) -> None:
        """Stop listening and cancel the calls in progress."""
        await self._server.stop(grace=None)


def service_names(methods: Mapping[str, object]) -> list[str]:
    """Return the full service names of full method names."""
    return sorted({name.split("/")[1] for name in methods})
