"""What ModelService tells about this server, from the engine's own reports and the files of the base."""

import enum
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loramux.v1 import common_pb2
from loramux.v1 import model_pb2 as pb
from loramux_server.engine.messages import Ready
from loramux_server.lora.adapter_table import AdapterTable
from loramux_server.lora.upload_request import UploadLimits
from loramux_server.rpc.admission import AdmissionGate
from loramux_server.rpc.engine_client import EngineClient
from loramux_server.rpc.generation_service import GenerationService
from loramux_server.rpc.limits import MAX_MESSAGE_BYTES, Limits

_WEIGHTS = {
    "nf4": common_pb2.WEIGHT_FORMAT_NF4,
    "bf16": common_pb2.WEIGHT_FORMAT_BF16,
    "fp32": common_pb2.WEIGHT_FORMAT_FP32,
}


class Phase(enum.Enum):
    """Phase of a replica's life."""

    STARTING = pb.SERVER_STATE_STARTING
    SERVING = pb.SERVER_STATE_SERVING
    ENGINE_RESTARTING = pb.SERVER_STATE_ENGINE_RESTARTING
    DRAINING = pb.SERVER_STATE_DRAINING


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """Facts of the base that are known before any engine runs.

    Attributes:
        name: Name that the operator gave.
        family: Architecture family.
        fingerprint_parts: Digest by part.
        fingerprint: Digest of all parts but the chat template.
        quantization: In words.
        eos_token_ids: Ids that end a sequence.
        has_chat_template: Whether chats are taken.
    """

    name: str
    family: str
    fingerprint_parts: Mapping[str, str]
    fingerprint: str
    quantization: str
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


class ReplicaView:
    """Answers `ModelService`."""

    def __init__(
        self,
        *,
        base: Callable[[], BaseModel],
        engine: EngineClient,
        ready: Callable[[], Ready],
        limits: Callable[[], Limits],
        upload_limits: UploadLimits,
        gate: AdmissionGate,
        generation: GenerationService,
        table: AdapterTable,
        phase: Callable[[], Phase],
        replica_id: str,
        version: str,
    ) -> None:
        """Create the view.

        Args:
            base: The base model; raises Unavailable before the first engine is ready.
            engine: For its statistics.
            ready: What the newest engine reported; raises Unavailable before the first.
            limits: Bounds of requests.
            upload_limits: Bounds of uploads.
            gate: Queue of the front end.
            generation: For the counts by tenant.
            table: For revision and residency.
            phase: Phase of life.
            replica_id: Id of this replica.
            version: Of the software.
        """
        self._base = base
        self._engine = engine
        self._ready = ready
        self._limits = limits
        self._upload_limits = upload_limits
        self._gate = gate
        self._generation = generation
        self._table = table
        self._phase = phase
        self._replica_id = replica_id
        self._version = version
        self._start = time.time()

    def model(self) -> pb.Model:
        """Describe the base model.

        Raises:
            Unavailable: ENGINE_UNAVAILABLE, no engine has reported it yet.
        """
        ready, base = self._ready(), self._base()
        parts = base.fingerprint_parts
        return pb.Model(
            name=base.name,
            family=base.family,
            fingerprint=common_pb2.BaseFingerprint(
                digest=base.fingerprint,
                config_digest=parts.get("config", ""),
                weights_digest=parts.get("weights", ""),
                tokenizer_digest=parts.get("tokenizer", ""),
                quantization=base.quantization,
                chat_template_digest=parts.get("chat_template", "") if base.has_chat_template else "",
            ),
            weight_format=_WEIGHTS.get(ready.weights, common_pb2.WEIGHT_FORMAT_UNSPECIFIED),
            vocab_size=ready.vocab_size,
            max_model_len=ready.max_model_len,
            eos_token_ids=base.eos_token_ids,
            has_chat_template=base.has_chat_template,
            limits=self._published_limits(ready),
        )

    def status(self, tenant: str) -> pb.ServerStatus:
        """Describe this replica, totals and all tenants included."""
        status = pb.ServerStatus(
            replica_id=self._replica_id,
            server_version=self._version,
            state=self._phase().value,
            revision=self._table.revision,
            load_level=self._load_level(),
            own=self._tenant_load(tenant),
            total=self._total(),
            tenants=[self._tenant_load(name) for name in sorted(self._generation.tenants() | {tenant})],
        )
        status.start_time.FromNanoseconds(int(self._start * 1e9))
        return status

    def _published_limits(self, ready: Ready) -> pb.Limits:
        limits = self._limits()
        return pb.Limits(
            max_output_tokens=limits.max_output_tokens,
            max_sequences=limits.max_sequences,
            max_logprobs=limits.max_logprobs,
            max_stop_strings=limits.max_stop_strings,
            max_stop_token_ids=limits.max_stop_token_ids,
            max_bad_words=limits.max_bad_words,
            max_batch_items=limits.max_batch_items,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_lora_rank=ready.max_rank,
            max_adapter_bytes=self._upload_limits.adapter_bytes,
            max_upload_chunk_bytes=self._upload_limits.chunk_bytes,
        )

    def _load_level(self) -> pb.LoadLevel.ValueType:
        share = self._gate.queued / self._gate.max_queued
        if share >= 1:
            return pb.LOAD_LEVEL_FULL
        if share >= 0.5:
            return pb.LOAD_LEVEL_HIGH
        return pb.LOAD_LEVEL_MODERATE if self._gate.queued else pb.LOAD_LEVEL_LOW

    def _tenant_load(self, tenant: str) -> pb.TenantLoad:
        counts: Counter[bool] = self._generation.counts(tenant)
        return pb.TenantLoad(
            tenant=tenant,
            running_requests=counts[True],
            queued_requests=counts[False],
            device_adapters=self._table.resident("gpu", tenant),
        )

    def _total(self) -> pb.ReplicaLoad:
        stats = self._engine.stats
        load = pb.ReplicaLoad(
            queued_requests=self._gate.queued,
            device_adapters=self._table.resident("gpu"),
            host_adapters=self._table.resident("host"),
            resident_weight_bytes=0 if self._engine.ready is None else self._engine.ready.resident_weight_bytes,
        )
        if stats is not None:
            load.running_requests = stats.running
            load.kv_pages_in_use = stats.kv_pages_used
            load.kv_pages_cached = stats.kv_pages_cached
            load.kv_pages_total = stats.kv_pages_total
            load.slab_units_in_use = stats.rank_units_used
            load.slab_units_total = stats.rank_units_total
        return load
