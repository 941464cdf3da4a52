"""The composition root: builds every part of the front end, starts it, drains it, takes it down in reverse order."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from opentelemetry.sdk.trace import SpanProcessor

from loramux_base.template import ChatTemplate, TemplateError
from loramux_server.base import describe_base
from loramux_server.config import ConfigError, ServerConfig
from loramux_server.engine.messages import Ready, Stats
from loramux_server.engine_process import LaunchEngine, engine_config, launch_subprocess
from loramux_server.hub import resolve_model
from loramux_server.lora.directory_source import DirectorySource
from loramux_server.lora.uploads import AdapterValidator
from loramux_server.lora.validation import ServedBase
from loramux_server.rpc.adapter_service import SERVICE as ADAPTER_SERVICE
from loramux_server.rpc.adapter_service import AdapterService
from loramux_server.rpc.admission import AdmissionGate
from loramux_server.rpc.call import Method
from loramux_server.rpc.engine_client import EngineClient
from loramux_server.rpc.freshness import Freshness
from loramux_server.rpc.generation_service import GenerationService
from loramux_server.rpc.limits import MAX_SEQUENCES, Limits
from loramux_server.rpc.model_service import ModelService
from loramux_server.rpc.pipeline import Pipeline
from loramux_server.rpc.prompt import PromptEncoder
from loramux_server.rpc.replica import BaseModel, Phase, ReplicaView
from loramux_server.rpc.resolver import TableResolver
from loramux_server.rpc.server import GrpcServer, HealthState, PortInUse, Transport, service_names
from loramux_server.rpc.slow_reader import SlowReader
from loramux_server.rpc.tls import TlsRotation
from loramux_server.rpc.token_bytes import token_bytes_of
from loramux_server.startup import ServeError, open_adapters, open_certificate, open_source
from loramux_server.supervisor import CrashLoop, EngineStartupError, RestartPolicy, Supervisor
from loramux_server.telemetry.probe import ProbeServer, ProbeSources
from loramux_server.telemetry.setup import build_telemetry
from loramux_server.tenancy.access import Access
from loramux_server.tenancy.names import shown_version
from loramux_server.text.tokenizer import Tokenizer, TokenizerError
from loramux_server.version import server_version

_log = logging.getLogger(__name__)


class App:
    """One server; `start`, then `wait`, then `stop`."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        version: str | None = None,
        launch: LaunchEngine | None = None,
        policy: RestartPolicy | None = None,
        transport: Transport | None = None,
        span_processor: SpanProcessor | None = None,
        validator: AdapterValidator | None = None,
    ) -> None:
        """Build the parts that need no file and no socket.

        Args:
            config: Settings.
            version: Of the software; None = the installed one.
            launch: Starts engines; None = engine processes for `config`.
            policy: When a dying engine is given up.
            transport: Connection settings.
            span_processor: An extra receiver of spans.
            validator: Checks uploads; None = the worker process.
        """
        self.config = config
        self.version = server_version() if version is None else version
        self.replica_id = config.replica_id or socket.gethostname()[:63]
        self.engine = EngineClient(hang_seconds=config.engine_timeout)
        self.gate = AdmissionGate(max_queued=config.max_queued)
        self.tls: TlsRotation | None = None
        self.telemetry = build_telemetry(
            queued=lambda: self.gate.queued,
            replica_id=self.replica_id,
            version=self.version,
            certificate=lambda: None if self.tls is None else self.tls.stats(),
            otlp_endpoint=config.otlp_endpoint,
            span_processor=span_processor,
        )
        self.port = 0
        self.probe_port: int | None = None
        self.draining = False
        self.ready = asyncio.Event()
        self._launch = launch
        self._validator = validator
        self._describe: Callable[[Ready], BaseModel]
        self._base: BaseModel | None = None
        self._policy = policy or RestartPolicy()
        self._transport = transport or Transport()
        self._last_ready: Ready | None = None
        self._supervisor: Supervisor | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._source: DirectorySource | None = None
        self._cleanup = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Open everything and listen; the engine comes up behind it (`ready` tells when).

        Raises:
            ServeError: Something is not as configured.
        """
        try:
            await self._start()
        except BaseException:
            await self._cleanup.aclose()
            raise

    async def _start(self) -> None:
        config = self.config
        self._cleanup.push_async_callback(asyncio.to_thread, self.telemetry.close)
        await self._listen_for_probes()
        self.tls = await open_certificate(self.config, self._cleanup)
        try:
            model = await asyncio.to_thread(resolve_model, config.model)
            tokenizer = await asyncio.to_thread(Tokenizer.from_directory, model)
            template = await asyncio.to_thread(ChatTemplate.from_directory, model)
        except (ConfigError, TokenizerError, TemplateError) as error:
            raise ServeError(str(error)) from error
        prompts = PromptEncoder(tokenizer, template)
        self._cleanup.callback(prompts.close)
        self._describe = lambda ready: describe_base(
            model,
            ready,
            name=self.model_name,
            eos_token_ids=tokenizer.eos_token_ids,
            has_chat_template=template.available,
        )
        self.lifecycle = await open_adapters(
            self.config, model, self.engine, base=self._served_base, validator=self._validator, cleanup=self._cleanup
        )
        self._source = await open_source(self.config, self.lifecycle, on_first_scan=self._announce)
        self.engine.on_version_state = self.lifecycle.on_version_state
        self.engine.on_stats = self._on_stats
        self.generation = GenerationService(
            engine=self.engine,
            limits=self.limits,
            prompts=prompts,
            resolver=TableResolver(self.lifecycle.table),
            gate=self.gate,
            telemetry=self.telemetry,
            token_bytes=token_bytes_of(tokenizer),
            shown_version=shown_version,
            model_name=self.model_name,
            replica_id=self.replica_id,
        )
        replica = ReplicaView(
            base=self.base,
            engine=self.engine,
            ready=self.last_ready,
            limits=self.limits,
            upload_limits=self.lifecycle.upload_limits,
            gate=self.gate,
            generation=self.generation,
            table=self.lifecycle.table,
            phase=self.phase,
            replica_id=self.replica_id,
            version=self.version,
        )
        access = Access()
        await self._listen(
            {
                **self.generation.methods(),
                **AdapterService(self.lifecycle, replica_id=self.replica_id).methods(),
                **ModelService(replica, access).methods(),
            },
            access,
        )
        supervisor = self._supervisor = Supervisor(
            self.engine,
            self._launch or launch_subprocess(engine_config(config, model)),
            prepare=self._prepare,
            resync=self.lifecycle.engine_state,
            on_serving=self._on_serving,
            on_restart=self._on_engine_lost,
            policy=self._policy,
        )
        self._supervision = asyncio.create_task(supervisor.run())
        self._cleanup.push_async_callback(self._end_supervision, supervisor)
        self._cleanup.push_async_callback(self._close_source)

    async def _close_source(self) -> None:
        if self._source is not None:
            await self._source.close()

    async def _listen(self, methods: Mapping[str, Method], access: Access) -> None:
        config = self.config
        services = service_names(methods)
        self.pipeline = Pipeline(
            methods,
            authorizer=access,
            observe=self.telemetry.observe_rpc,
            revisions=Freshness(self.lifecycle.table),
            endless=frozenset({f"/{ADAPTER_SERVICE}/WatchAdapters"}),
            slow_reader=SlowReader(seconds=config.slow_reader_seconds),
        )
        self.health = HealthState(services)
        await self.health.set(False)
        server = GrpcServer(self.pipeline, self.health, services, transport=self._transport, reflect=config.reflection)
        self._cleanup.push_async_callback(server.stop)
        try:
            self.port = await server.start(
                config.host, config.port, None if self.tls is None else self.tls.credentials()
            )
        except PortInUse as error:
            raise ServeError(f"--port {config.port}: {error}; choose another or end what listens there") from error

    async def _listen_for_probes(self) -> None:
        """Answer probes from the first moment to the last, so that they tell why nothing else answers."""
        address = self.config.probe_address
        if address is None:
            return
        probe = ProbeServer(
            ProbeSources(
                live=lambda: self._supervisor is None or not self._supervisor.crash_looping,
                ready=lambda: self._serving and not self.draining,
                metrics=self.telemetry.prometheus,
            )
        )
        try:
            self.probe_port = await probe.start(*address)
        except OSError as error:
            raise ServeError(
                f"--probe {self.config.probe} is in use or not an address of this machine; choose another or end what "
                "listens there"
            ) from error
        self._cleanup.push_async_callback(probe.close)
        _log.info("probe listens on %s:%d", address[0], self.probe_port)

    # --- life ------------------------------------------------------------------------------------------------------

    async def wait(self) -> None:
        """Wait until the engine cannot be kept alive.

        Raises:
            ServeError: The first engine could not start.
            CrashLoop: The engine died too often.
        """
        assert self._supervision is not None, "start first"
        try:
            await asyncio.shield(self._supervision)
        except EngineStartupError as error:
            raise ServeError(str(error)) from error

    async def drain(self) -> None:
        """Say NOT_SERVING, refuse new calls, and wait for those in progress, at most the grace."""
        self.draining = True
        await self.health.drain()
        await self._close_source()
        await asyncio.sleep(self.config.drain_delay)
        self.pipeline.drain()
        try:
            async with asyncio.timeout(self.config.grace):
                await self.pipeline.wait_idle()
        except TimeoutError:
            _log.warning("%d calls did not end within the grace of %g s", self.pipeline.running, self.config.grace)

    async def stop(self) -> None:
        """End everything; calls in progress are cancelled."""
        self.draining = True
        await self._cleanup.aclose()

    # --- what the parts ask ----------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """Name of the base model."""
        return self.config.model_name or Path(self.config.model).name or self.config.model

    def last_ready(self) -> Ready:
        """Report of the engine that is or was ready last.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE, none has been ready yet.
        """
        ready = self._last_ready = self.engine.ready or self._last_ready
        if ready is None:
            raise self.engine.unavailable()
        return ready

    def base(self) -> BaseModel:
        """The base model.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE, no engine has been ready yet.
        """
        if self._base is None:
            raise self.engine.unavailable()
        return self._base

    def _served_base(self) -> ServedBase:
        base = self.base()
        return ServedBase(fingerprint=base.fingerprint, parts=base.fingerprint_parts)

    def phase(self) -> Phase:
        """Phase of the server's life."""
        if self.draining:
            return Phase.DRAINING
        if self.engine.serving:
            return Phase.SERVING if self._serving else Phase.STARTING
        return Phase.STARTING if self._last_ready is None else Phase.ENGINE_RESTARTING

    def limits(self) -> Limits:
        """Bounds of a request on the engine that is or was ready last.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE, no engine has been ready yet.
        """
        ready = self.last_ready()
        longest = ready.max_model_len - 1
        return Limits(
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_model_len,
            max_output_tokens=min(longest, self.config.max_output_tokens or longest),
            max_sequences=min(MAX_SEQUENCES, self.config.max_running),
            max_prompt_bytes=self.config.max_prompt_bytes,
        )

    def _on_stats(self, stats: Stats) -> None:
        self.telemetry.engine.update(stats)

    async def _prepare(self, ready: Ready) -> None:
        if self._base is None:
            self._base = await asyncio.to_thread(self._describe, ready)

    async def _on_serving(self, serving: bool) -> None:
        if serving and self._source is not None:
            self._source.begin()
        await self._announce()

    @property
    def _serving(self) -> bool:
        """Whether requests are accepted and adapters of `--adapters` have been looked at."""
        return self.engine.serving and (self._source is None or self._source.first_scan_over)

    async def _announce(self) -> None:
        if self._serving:
            self.ready.set()
        else:
            self.ready.clear()
        if not self.draining:
            await self.health.set(self._serving)

    def _on_engine_lost(self) -> None:
        self.telemetry.engine.engine_restarted()
        self.lifecycle.engine_lost()

    async def _end_supervision(self, supervisor: Supervisor) -> None:
        await supervisor.stop()
        assert self._supervision is not None
        self._supervision.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineStartupError, CrashLoop):
            await self._supervision
