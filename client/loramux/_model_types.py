"""Values of the model and status calls."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


class WeightFormat(enum.StrEnum):
    """Format in which the weights of the base are resident."""

    NF4 = "nf4"
    BF16 = "bf16"
    FP32 = "fp32"
    UNKNOWN = "unknown"
    """A format that this version of the SDK does not know."""


class ServerState(enum.StrEnum):
    """Phase of a replica's life."""

    STARTING = "starting"
    SERVING = "serving"
    ENGINE_RESTARTING = "engine_restarting"
    DRAINING = "draining"
    UNKNOWN = "unknown"
    """A state that this version of the SDK does not know."""


class LoadLevel(enum.StrEnum):
    """Coarse load of a replica."""

    LOW = "low"
    """New requests start at once."""
    MODERATE = "moderate"
    """New requests start at once or after a short wait."""
    HIGH = "high"
    """New requests wait."""
    FULL = "full"
    """New requests are refused."""
    UNKNOWN = "unknown"
    """A level that this version of the SDK does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFingerprint:
    """Identity of a base model; all digests are sha256 in 64 hexadecimal digits.

    Attributes:
        digest: Over all parts but the chat template.
        config_digest: Configuration essentials.
        weights_digest: Tensors.
        tokenizer_digest: Tokenizer.
        quantization: Quantization spec in words.
        chat_template_digest: Chat template; empty if the model has none.
    """

    digest: str
    config_digest: str
    weights_digest: str
    tokenizer_digest: str
    quantization: str
    chat_template_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a server; those of a tenant may be lower.

    Attributes:
        max_output_tokens: Most tokens generated a sequence.
        max_sequences: Largest `n`.
        max_logprobs: Largest `logprobs` and `prompt_logprobs`.
        max_stop_strings: Most stop strings a request.
        max_stop_token_ids: Most stop token ids a request.
        max_bad_words: Most bad words a request.
        max_batch_items: Most items a batch call.
        max_message_bytes: Largest message in bytes.
        max_lora_rank: Largest rank of an adapter.
        max_adapter_bytes: Largest adapter in bytes, all files together.
        max_upload_chunk_bytes: Largest piece of an upload in bytes.
    """

    max_output_tokens: int
    max_sequences: int
    max_logprobs: int
    max_stop_strings: int
    max_stop_token_ids: int
    max_bad_words: int
    max_batch_items: int
    max_message_bytes: int
    max_lora_rank: int
    max_adapter_bytes: int
    max_upload_chunk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The base model of a server.

    Attributes:
        name: Name that the operator gave it.
        family: Architecture family, for example `llama`.
        fingerprint: Identity of the base.
        weight_format: Format in which the weights are resident.
        vocab_size: Number of token ids.
        max_model_len: Context in tokens, prompt and output together.
        eos_token_ids: Ids that end a sequence.
        has_chat_template: Whether chat prompts are served.
        limits: Limits of the server.
        raw: The protobuf message, for those who need it.
    """

    name: str
    family: str
    fingerprint: BaseFingerprint
    weight_format: WeightFormat
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    limits: Limits
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLoad:
    """Requests and adapters of one tenant on one replica.

    Attributes:
        tenant: Id of the tenant.
        running_requests: Requests that are generating.
        queued_requests: Requests that wait for admission.
        device_adapters: Adapter versions of the tenant on the device.
    """

    tenant: str
    running_requests: int
    queued_requests: int
    device_adapters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """Use of one replica's resources, for operators.

    Attributes:
        running_requests: Requests that are generating.
        queued_requests: Requests that wait for admission.
        kv_pages_in_use: KV pages that running sequences hold.
        kv_pages_cached: KV pages that only the prefix cache holds.
        kv_pages_total: KV pages in all.
        slab_units_in_use: Rank units (16 rows) of the adapter slab in use.
        slab_units_total: Rank units of the adapter slab in all.
        device_adapters: Adapter versions on the device.
        host_adapters: Adapter versions in host memory.
        resident_weight_bytes: Bytes of base weights that are resident.
    """

    running_requests: int
    queued_requests: int
    kv_pages_in_use: int
    kv_pages_cached: int
    kv_pages_total: int
    slab_units_in_use: int
    slab_units_total: int
    device_adapters: int
    host_adapters: int
    resident_weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """What a replica is doing.

    Attributes:
        replica_id: The replica.
        server_version: Version of the server software.
        state: Phase of its life.
        start_time: When it started (UTC).
        revision: Newest registry revision that it has seen.
        load_level: Coarse load.
        own: Counts of the acted-for tenant.
        total: Counts over all tenants; None unless the caller is an operator.
        tenants: Counts a tenant; empty unless the caller is an operator.
        raw: The protobuf message, for those who need it.
    """

    replica_id: str
    server_version: str
    state: ServerState
    start_time: datetime
    revision: int
    load_level: LoadLevel
    own: TenantLoad
    total: ReplicaLoad | None
    tenants: tuple[TenantLoad, ...]
    raw: Any = field(default=None, repr=False, compare=False)
