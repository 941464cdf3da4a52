"""From the messages of the model calls to the SDK's values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC

from loramux._model_types import (
    BaseFingerprint,
    Limits,
    LoadLevel,
    Model,
    ReplicaLoad,
    ServerState,
    ServerStatus,
    TenantLoad,
    WeightFormat,
)
from loramux.v1 import common_pb2
from loramux.v1 import model_pb2 as pb

_FORMATS: Mapping[int, WeightFormat] = {
    common_pb2.WEIGHT_FORMAT_NF4: WeightFormat.NF4,
    common_pb2.WEIGHT_FORMAT_BF16: WeightFormat.BF16,
    common_pb2.WEIGHT_FORMAT_FP32: WeightFormat.FP32,
}
_STATES: Mapping[int, ServerState] = {
    pb.SERVER_STATE_STARTING: ServerState.STARTING,
    pb.SERVER_STATE_SERVING: ServerState.SERVING,
    pb.SERVER_STATE_ENGINE_RESTARTING: ServerState.ENGINE_RESTARTING,
    pb.SERVER_STATE_DRAINING: ServerState.DRAINING,
}
_LEVELS: Mapping[int, LoadLevel] = {
    pb.LOAD_LEVEL_LOW: LoadLevel.LOW,
    pb.LOAD_LEVEL_MODERATE: LoadLevel.MODERATE,
    pb.LOAD_LEVEL_HIGH: LoadLevel.HIGH,
    pb.LOAD_LEVEL_FULL: LoadLevel.FULL,
}


def model(value: pb.Model) -> Model:
    """Convert the description of the model."""
    identity, limits = value.fingerprint, value.limits
    return Model(
        name=value.name,
        family=value.family,
        fingerprint=BaseFingerprint(
            digest=identity.digest,
            config_digest=identity.config_digest,
            weights_digest=identity.weights_digest,
            tokenizer_digest=identity.tokenizer_digest,
            quantization=identity.quantization,
            chat_template_digest=identity.chat_template_digest,
        ),
        weight_format=_FORMATS.get(value.weight_format, WeightFormat.UNKNOWN),
        vocab_size=value.vocab_size,
        max_model_len=value.max_model_len,
        eos_token_ids=tuple(value.eos_token_ids),
        has_chat_template=value.has_chat_template,
        limits=Limits(
            max_output_tokens=limits.max_output_tokens,
            max_sequences=limits.max_sequences,
            max_logprobs=limits.max_logprobs,
            max_stop_strings=limits.max_stop_strings,
            max_stop_token_ids=limits.max_stop_token_ids,
            max_bad_words=limits.max_bad_words,
            max_batch_items=limits.max_batch_items,
            max_message_bytes=limits.max_message_bytes,
            max_lora_rank=limits.max_lora_rank,
            max_adapter_bytes=limits.max_adapter_bytes,
            max_upload_chunk_bytes=limits.max_upload_chunk_bytes,
        ),
        raw=value,
    )


def _tenant(value: pb.TenantLoad) -> TenantLoad:
    """Convert the counts of a tenant."""
    return TenantLoad(
        tenant=value.tenant,
        running_requests=value.running_requests,
        queued_requests=value.queued_requests,
        device_adapters=value.device_adapters,
    )


def _total(value: pb.ReplicaLoad) -> ReplicaLoad:
    """Convert the counts of a replica."""
    return ReplicaLoad(
        running_requests=value.running_requests,
        queued_requests=value.queued_requests,
        kv_pages_in_use=value.kv_pages_in_use,
        kv_pages_cached=value.kv_pages_cached,
        kv_pages_total=value.kv_pages_total,
        slab_units_in_use=value.slab_units_in_use,
        slab_units_total=value.slab_units_total,
        device_adapters=value.device_adapters,
        host_adapters=value.host_adapters,
        resident_weight_bytes=value.resident_weight_bytes,
    )


def status(value: pb.ServerStatus) -> ServerStatus:
    """Convert the state of a replica."""
    return ServerStatus(
        replica_id=value.replica_id,
        server_version=value.server_version,
        state=_STATES.get(value.state, ServerState.UNKNOWN),
        start_time=value.start_time.ToDatetime(tzinfo=UTC),
        revision=value.revision,
        load_level=_LEVELS.get(value.load_level, LoadLevel.UNKNOWN),
        own=_tenant(value.own),
        total=_total(value.total) if value.HasField("total") else None,
        tenants=tuple(_tenant(tenant) for tenant in value.tenants),
        raw=value,
    )
