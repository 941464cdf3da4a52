"""What crosses the socket between the front end and the engine: msgspec structs, msgpack, length-prefixed frames.

A frame is a 4-byte big-endian length and a msgpack body: `CommandFrame` towards the engine, `EventFrame` back, at most
one a step. There is no pickle anywhere. Both sides treat add and abort as idempotent; events of an older epoch (a
former engine process) are dropped by the front end. This module imports no torch: the front end imports it.
"""

import msgspec

MAX_FRAME_BYTES = 64 * 1024 * 1024


class SamplingSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling of one request, already validated: every field in range, every token id in the vocabulary.

    Attributes:
        temperature: 0 is greedy.
        top_p: In (0, 1]; 1 is off.
        top_k: 0 is off.
        min_p: In [0, 1]; 0 is off.
        repetition_penalty: > 0; 1 is off. Over prompt and output.
        presence_penalty: Subtracted once from a token seen in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        logit_bias: Token id to an additive bias.
        seed: Counter-based random numbers depend only on (seed, choice index, position). Always set by the front end.
        max_tokens: >= 1 output tokens a sequence.
        min_tokens: End tokens and stop tokens are masked until so many are out.
        stop_token_ids: Extra ids that end a sequence (reason STOP; the id is the last token out).
        eos_token_ids: The model's own end tokens.
        ignore_eos: Treat `eos_token_ids` as ordinary tokens.
        bad_words: Token sequences that must not be completed.
        n: Sequences a request; one prefill, forked pages.
        logprobs: None = none; k = the chosen token's and the k best (0 <= k <= 20), of the raw logits.
        prompt_logprobs: None = none; k likewise for every prompt token but the first.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    eos_token_ids: list[int] = []
    ignore_eos: bool = False
    bad_words: list[list[int]] = []
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class VersionSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable adapter version as the engine knows it.

    Attributes:
        version: Resource name `tenants/{t}/adapters/{a}/versions/{digest}`; the engine's key, opaque to it.
        digest: Full sha256 hex of the version; part of the prefix cache's root key.
        path: Directory with `adapter_config.json` and `adapter_model.safetensors` (validated before).
    """

    version: str
    digest: str
    path: str


class AliasSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter name and where its traffic goes, as of `revision`.

    Attributes:
        alias: Resource name `tenants/{t}/adapters/{a}`.
        targets: (version, weight) pairs, weights > 0; empty = nothing serves, requests fail with ADAPTER_NOT_FOUND.
        revision: Registry revision of this state; an older one never overwrites a newer one.
    """

    alias: str
    targets: list[tuple[str, float]]
    revision: int


# --- front end -> engine -------------------------------------------------------------------------------------------


class Add(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """One request. Answered by exactly one `Done`, whatever happens.

    Attributes:
        request_id: Minted by the front end, unique for this engine process; a repeated id is ignored.
        prompt_token_ids: At least one.
        sampling: See `SamplingSpec`.
        alias: Adapter name bound at admission; None with `version` None = the base model.
        version: Exact version bound on arrival; wins over `alias`.
        split_key: Stickiness of a weighted alias; empty = drawn from the seed.
        salt: The tenant's secret prefix-cache salt.
        fairness_key: Whom the scheduler charges; opaque.
        weight: Share of that key.
        priority: Orders requests within one key; higher first.
        time_left: Seconds until the deadline, measured at send; None = none.
        soft_time_limit: Seconds from arrival after which sequences end with reason `time_limit`; a request that was
            not admitted by then fails with DEADLINE_EXCEEDED. None = none.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec
    alias: str | None = None
    version: str | None = None
    split_key: str = ""
    salt: bytes = b""
    fairness_key: str = ""
    weight: float = 1.0
    priority: int = 0
    time_left: float | None = None
    soft_time_limit: float | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop a request wherever it is. Answered by `Done(status="cancelled")` if it was alive, else ignored."""

    request_id: str


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """A stop string matched in the front end: sequence `index` ends after `tokens` output tokens, the rest is lost."""

    request_id: str
    index: int
    tokens: int


class PutVersion(msgspec.Struct, frozen=True, kw_only=True, tag="put_version"):
    """Make a version known (nothing is loaded yet)."""

    spec: VersionSpec


class DropVersion(msgspec.Struct, frozen=True, kw_only=True, tag="drop_version"):
    """Forget a version: new requests fail with ADAPTER_NOT_FOUND; once running ones ended, it leaves slab and cache."""

    version: str


class PutAlias(msgspec.Struct, frozen=True, kw_only=True, tag="put_alias"):
    """Set where an alias points: takes effect for every request admitted after this frame, queued ones included."""

    spec: AliasSpec


class DropAlias(msgspec.Struct, frozen=True, kw_only=True, tag="drop_alias"):
    """Forget an alias."""

    alias: str
    revision: int


class Preload(msgspec.Struct, frozen=True, kw_only=True, tag="preload"):
    """Load a version into the slab (promote's warm-up). Answered by `Completed(operation_id)`."""

    operation_id: str
    version: str


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag="unload"):
    """Free a version's slab rows once no sequence uses it, not the host's. Answered by `Completed(operation_id)`."""

    operation_id: str
    version: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """Answered by `Pong` in the next frame: an engine without work says nothing by itself."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Cancel what is left, flush events, exit 0."""


Command = Add | Abort | Stop | PutVersion | DropVersion | PutAlias | DropAlias | Preload | Unload | Ping | Shutdown


class CommandFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One frame towards the engine."""

    commands: list[Command]


# --- engine -> front end -------------------------------------------------------------------------------------------


class ErrorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A domain error on the wire; see `loramux_server.errors.from_reason`.

    Attributes:
        reason: A `loramux_server.errors.Reason`.
        message: For the caller.
        retry_after: Seconds after which a retry may succeed; None when it cannot help.
        field: Request field it is about (`sampling.n`); "" = none.
    """

    reason: str
    message: str
    retry_after: float | None = None
    field: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probability (natural log, of the raw logits) of the chosen token and of the k best, best first."""

    logprob: float
    top: list[tuple[int, float]] = []


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """First event of an engine process: weights, kernels and pools are warm.

    Attributes:
        fingerprint: Base fingerprint (hex).
        max_model_len: Longest prompt + output in tokens.
        vocab_size: Token ids are below it.
        device: `cpu` or `cuda:0 (name)`.
        weights: Weight mode served (`nf4`, `bf16`, `fp32`).
        resident_weight_bytes: Bytes of base weights kept resident, shadows included.
        kv_pages: Usable pages.
        page_size: Tokens a page.
        rank_units: Slab capacity in units of 16 rank rows.
        max_rank: Largest adapter rank.
        details: Facts for the log and `GetServerStatus` (kernel back ends, dtype, versions, seconds to ready), and
            the digests of the fingerprint's parts as `fingerprint.config`, `fingerprint.weights`, ...
    """

    fingerprint: str
    max_model_len: int
    vocab_size: int
    device: str
    weights: str
    resident_weight_bytes: int
    kv_pages: int
    page_size: int
    rank_units: int
    max_rank: int
    details: dict[str, str] = {}


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """A request was admitted: the adapter is bound and resident, pages are reserved.

    Attributes:
        request_id: Whose.
        version: Bound version, or "" for the base.
        digest: Its digest, or "".
        revision: Registry revision of the alias state that bound it; 0 for base or pinned version.
        cached_tokens: Prompt tokens taken from the prefix cache.
        queue_time: Seconds from arrival to admission.
        load_time: Seconds of that spent loading the adapter.
    """

    request_id: str
    version: str
    digest: str
    revision: int
    cached_tokens: int
    queue_time: float
    load_time: float


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True, tag="prompt_logprobs"):
    """Log-probabilities of prompt tokens `start`, `start + 1`, ... (position 0 has none)."""

    request_id: str
    start: int
    entries: list[TokenLogprob]


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """New output tokens of one sequence, in order. `first` is the output index of the first of them."""

    request_id: str
    index: int
    first: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []


class SequenceFinished(msgspec.Struct, frozen=True, kw_only=True, tag="sequence_finished"):
    """A sequence ended by itself.

    Attributes:
        request_id: Whose.
        index: Which of the n.
        reason: `stop` (end or stop token, or the front end's `Stop`), `length`, `time_limit`.
        stop_token_id: The token that ended it, else None.
        tokens: Output tokens in all, the stop token included.
    """

    request_id: str
    index: int
    reason: str
    stop_token_id: int | None
    tokens: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The terminal event of a request: exactly one for each accepted `Add`; pages and references are free.

    Attributes:
        request_id: Whose.
        status: `finished`, `cancelled` or `failed`.
        error: Set exactly when failed.
        prompt_tokens: Prompt length.
        cached_tokens: Prompt tokens taken from the prefix cache.
        output_tokens: Output tokens over all sequences; those that a `Stop` dropped are not counted.
        computed_tokens: Tokens computed for it, recomputation included (what fairness charges).
        prefill_time: Seconds from admission to the first token; 0 if there was none.
        decode_time: Seconds from the first token to the end.
        preemptions: Times it was preempted.
    """

    request_id: str
    status: str
    error: ErrorSpec | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    preemptions: int = 0


class Completed(msgspec.Struct, frozen=True, kw_only=True, tag="completed"):
    """An operation (`Preload`, `Unload`) ended; `error` is None on success."""

    operation_id: str
    error: ErrorSpec | None = None


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    """The answer to `Ping`."""


class VersionState(msgspec.Struct, frozen=True, kw_only=True, tag="version_state"):
    """Residency or references of a version changed; changes of references are coalesced, sent with `Stats`.

    Attributes:
        version: Which.
        residency: `gpu` (in the slab), `host` (in the arena), `store`.
        references: Requests that hold it now.
        dropped: True once a dropped version has left everything.
    """

    version: str
    residency: str
    references: int
    dropped: bool = False


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Gauges, counters since the engine started; sent every 0.25 s and when idle begins. `host_*`: `plan.HostUse`."""

    waiting: int
    running: int
    kv_pages_used: int
    kv_pages_cached: int
    kv_pages_total: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    rank_units_used: int
    rank_units_total: int
    resident_versions: int
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    steps: int
    step_seconds: dict[str, float]
    prefill_tokens: int
    decode_tokens: int
    requests_finished: int
    requests_cancelled: int
    requests_failed: int
    distinct_adapters: int = 0
    host_bytes_used: int = 0
    host_bytes_total: int = 0
    host_hits: int = 0
    host_misses: int = 0
    host_prefetches: int = 0


Event = Ready | Started | PromptLogprobs | Tokens | SequenceFinished | Done | Completed | Pong | VersionState | Stats


class EventFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One frame towards the front end. `step` grows by one a frame; `epoch` is the engine process's number."""

    epoch: int
    step: int
    events: list[Event]
