"""Settings of one engine process; the front end sends them on the command line as JSON. Imports no torch."""

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen settings; `None` means "decided at start from the device and the model".

    Attributes:
        model: Directory of the base checkpoint (resolved by the front end; never a hub id).
        weights: `nf4`, `bf16` or `fp32`.
        device: `auto`, `cpu` or `cuda`.
        epoch: Number of this engine process; echoed in every event frame.
        max_model_len: Longest prompt + output in tokens; None = the model's own, bounded by the KV pool.
        page_size: Tokens a KV page.
        kv_pages: Usable KV pages; None = from free memory on CUDA, `kv_tokens` on CPU.
        kv_tokens: KV pool on CPU in tokens when `kv_pages` is None.
        gpu_memory_utilization: Share of the device's memory that weights, slab and pages may take.
        max_running: Most sequences in one step.
        max_batch_tokens: Token budget of one step.
        prefill_chunk: Most prompt tokens of one sequence in one step; None = what `loramux-server tune` found best for
            this model on this card, else 512; never more than `max_batch_tokens`.
        prefix_cache: Reuse full pages of equal prefixes under the typed key.
        max_rank: Largest adapter rank taken (a multiple of 16).
        rank_units: Slab capacity in units of 16 rank rows.
        max_slots: Most adapters resident at once.
        host_adapter_bytes: Host memory that keeps adapters between store and slab; None = 2 GiB on CUDA, page-locked,
            and 256 MiB on CPU, but no more than a quarter of the machine's memory. 0 = none.
        serving_blobs: Write each adapter's rows as the slab takes them into its directory, and read them from there;
            only where the directories are the server's own.
        batch_invariant: A request's tokens do not depend on what else is in the batch.
        cuda_graphs: Replay captured graphs instead of launching kernel by kernel (CUDA only).
        schedule_ahead: Launch step k + 1 before the results of step k are in (None = yes on CUDA, no on CPU, where a
            launch returns when the step is over).
        shadow: Keep a dequantized copy of the weights (None = yes on CPU, no on CUDA).
        threads: torch intra-op threads on CPU; None = physical cores.
        poison: Fill freed pages and slab rows with NaN (tests and debugging).
        self_test: Compare a two-layer random model of the checkpoint's flags with transformers at start.
    """

    model: str
    weights: str = "nf4"
    device: str = "auto"
    epoch: int = 0
    max_model_len: int | None = None
    page_size: int = 16
    kv_pages: int | None = None
    kv_tokens: int = 32768
    gpu_memory_utilization: float = 0.9
    max_running: int = 128
    max_batch_tokens: int = 2048
    prefill_chunk: int | None = None
    prefix_cache: bool = True
    max_rank: int = 64
    rank_units: int = 64
    max_slots: int = 64
    host_adapter_bytes: int | None = None
    serving_blobs: bool = False
    batch_invariant: bool = False
    cuda_graphs: bool = True
    schedule_ahead: bool | None = None
    shadow: bool | None = None
    threads: int | None = None
    poison: bool = False
    self_test: bool = True
