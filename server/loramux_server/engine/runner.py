"""Builds the runner of one engine process: model, KV pool, slab, warm-up, and the `Ready` event that describes them."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from loramux_base.checkpoint import read_json
from loramux_base.shapes import UnsupportedBase, base_shapes
from loramux_server.engine.adapter_loader import AdapterLoader, NoAdapters
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.device_memory import MemoryMeter, predicted
from loramux_server.engine.footprint import Footprint, warnings
from loramux_server.engine.graphs import CudaRecorder, ForwardGraphs, Recorder
from loramux_server.engine.host_arena import arena_bytes
from loramux_server.engine.limits import prefill_chunk
from loramux_server.engine.memory import KvPlan, allocate_kv, plan_kv
from loramux_server.engine.messages import Ready, SamplingSpec
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.plan import RowPlan, StepPlan
from loramux_server.engine.staging import BatchStaging
from loramux_server.engine.static_batch import StaticBatch
from loramux_server.model.causal_lm import CausalLM
from loramux_server.model.linear import TuningTable
from loramux_server.model.load import load_model
from loramux_server.model.self_test import self_test
from loramux_server.model.slab import LoraSlab

logger = logging.getLogger(__name__)

_WARM_UP = SamplingSpec(max_tokens=1, temperature=0.7, top_k=20, top_p=0.9, logprobs=1)


class NoDevice(ValueError):
    """The device asked for is not there; the server refuses to start."""


def build_runner(
    config: EngineConfig, *, record: Recorder | None = None, table: TuningTable | None = None
) -> ModelRunner:
    """Load, size, warm up.

    Args:
        config: Settings of this process.
        record: Makes the graphs of forward passes; None = CUDA graphs where the device and the settings allow them.
        table: Choices of the NF4 product's backend; None = those of the card, if it was tuned.

    Raises:
        NoDevice: CUDA was asked for and is not there.
        BadModelLength: `max_model_len` is out of the model's range.
        ModelLoadError: The checkpoint cannot be served.
        UnsupportedModel: Its architecture or a flag is not supported.
        SelfTestError: Our layers and transformers' disagree on a small model of the same flags.
        NotEnoughMemory: One request of maximum length does not fit.
    """
    began = time.monotonic()
    device = _device(config)
    if device.type == "cpu" and config.threads is not None:
        torch.set_num_threads(config.threads)
    directory = Path(config.model)
    meter = MemoryMeter(device)
    model = load_model(
        directory,
        weights=config.weights,
        device=device,
        shadow=config.shadow,
        batch_invariant=config.batch_invariant,
        table=table,
    )
    weight_bytes = meter.take(model.resident_weight_bytes)
    if config.self_test:
        model.details["self_test_deviation"] = f"{self_test(model.spec, device=device, dtype=model.dtype):.3g}"
    meter.take(0)
    slab, loader = _residency(config, directory, model)
    adapter_bytes = meter.take(slab.nbytes if slab is not None else 0)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading has left behind is no step's
    plan = plan_kv(
        config,
        model.spec,
        dtype=model.dtype,
        device=device,
        largest_step=lambda: _largest_step(config, model, slab, loader),
    )
    meter.take(0)
    kv = allocate_kv(model.spec, pages=plan.pages, page_size=config.page_size, dtype=model.dtype, device=device)
    kv_bytes = meter.take(sum(layer.nbytes for layer in kv))
    ready = _ready(config, model, plan, loader)
    runner = _runner(config, model, kv, slab, loader, plan.max_model_len, ready)
    _warm_up(runner, config, plan.max_model_len)
    if record is None and device.type == "cuda" and config.cuda_graphs:
        record = CudaRecorder(device)
    if record is not None:
        runner.capture(_graphs(config, model, kv, slab, plan.max_model_len, record))
    actual = Footprint(
        weight_bytes=weight_bytes,
        adapter_bytes=adapter_bytes,
        kv_bytes=kv_bytes,
        step_bytes=meter.steps(weight_bytes + adapter_bytes + kv_bytes),
        kv_pages=plan.pages,
    )
    ready.details.update(_held_against_the_plan(config, model, slab, actual) | meter.totals())
    ready.details["seconds_to_ready"] = f"{time.monotonic() - began:.1f}"
    return runner


def _held_against_the_plan(
    config: EngineConfig, model: CausalLM, slab: LoraSlab | None, actual: Footprint
) -> dict[str, str]:
    """Both footprints, for `Ready.details`; warns of parts that take more than predicted."""
    planned = predicted(config, model.spec, slab.base if slab is not None else None, model.device)
    for line in warnings(planned, actual):
        logger.warning("%s", line)
    return planned.details("planned") | actual.details("actual")


def _residency(
    config: EngineConfig, directory: Path, model: CausalLM
) -> tuple[LoraSlab | None, AdapterLoader | NoAdapters]:
    try:
        shapes = base_shapes(read_json(directory / "config.json"))
    except UnsupportedBase as error:
        logger.warning("adapters are not served on this base: %s", error)
        return None, NoAdapters(str(error))
    slab = LoraSlab(
        shapes,
        rank_units=config.rank_units,
        max_slots=config.max_slots,
        max_rank=config.max_rank,
        dtype=model.dtype,
        device=model.device,
        poison=config.poison,
    )
    asked = config.host_adapter_bytes
    host_bytes = arena_bytes(asked, cuda=model.device.type == "cuda")
    if asked is not None and host_bytes < asked:
        logger.warning(
            "--host-adapter-gib: %.2f is over half of this machine's memory; %.2f GiB are used, ask for no more",
            asked / 2**30,
            host_bytes / 2**30,
        )
    loader = AdapterLoader(
        slab,
        shapes,
        rank_units=config.rank_units,
        max_slots=config.max_slots,
        max_rank=config.max_rank,
        device=model.device,
        host_bytes=host_bytes,
        serving_blobs=config.serving_blobs,
    )
    return slab, loader


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NoDevice(
            f"device: cuda was asked for, but torch {torch.__version__} finds no CUDA device here; use --device cpu or "
            "auto, or install a torch with CUDA and check nvidia-smi"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _runner(
    config: EngineConfig,
    model: CausalLM,
    kv: list[torch.Tensor],
    slab: LoraSlab | None,
    loader: AdapterLoader | NoAdapters,
    max_model_len: int,
    ready: Ready,
) -> ModelRunner:
    staging = BatchStaging(
        device=model.device,
        max_tokens=config.max_batch_tokens,
        max_sequences=config.max_running,
        max_pages=-(-max_model_len // config.page_size),
        page_size=config.page_size,
    )
    return ModelRunner(model, kv=kv, slab=slab, loader=loader, staging=staging, page_size=config.page_size, ready=ready)


def _graphs(
    config: EngineConfig,
    model: CausalLM,
    kv: list[torch.Tensor],
    slab: LoraSlab | None,
    max_model_len: int,
    record: Recorder,
) -> ForwardGraphs:
    sequences = min(config.max_running, config.max_batch_tokens)
    static = StaticBatch(
        device=model.device,
        max_tokens=config.max_batch_tokens,
        max_sequences=sequences,
        max_pages=-(-max_model_len // config.page_size),
        max_segments=min(config.max_slots, sequences) + 1,
        page_size=config.page_size,
    )
    return ForwardGraphs(
        model,
        kv=kv,
        slab=slab,
        static=static,
        max_tokens=config.max_batch_tokens,
        max_sequences=sequences,
        max_model_len=max_model_len,
        batch_invariant=config.batch_invariant,
        record=record,
    )


def _rows(counts: Sequence[int], page_size: int) -> list[RowPlan]:
    """Fresh sequences of the given lengths over consecutive pages from 1 on."""
    rows: list[RowPlan] = []
    page = 1
    for index, count in enumerate(counts):
        pages = -(-count // page_size)
        rows.append(
            RowPlan(
                sequence_id=-1 - index,
                token_ids=[0] * count,
                start=0,
                pages=range(page, page + pages),
                slot=-1,
                sample=True,
                sampling=_WARM_UP,
                choice=0,
                position=count,
                history=[0] * count,
                prompt_length=count,
            )
        )
        page += pages
    return rows


def _largest_step(
    config: EngineConfig, model: CausalLM, slab: LoraSlab | None, loader: AdapterLoader | NoAdapters
) -> None:
    """The step with the highest memory peak: a full token budget over the most sampled rows."""
    share = max(1, config.max_batch_tokens // config.max_running)
    counts = [share] * min(config.max_running, config.max_batch_tokens)
    counts[-1] += config.max_batch_tokens - sum(counts)
    # No sequence is longer than the rotary tables.
    counts = [min(count, model.spec.max_position) for count in counts]
    rows = _rows(counts, config.page_size)
    pages = max(max(row.pages) for row in rows)
    kv = allocate_kv(model.spec, pages=pages, page_size=config.page_size, dtype=model.dtype, device=model.device)
    nothing = KvPlan(pages=0, page_bytes=0, max_model_len=0)
    runner = _runner(config, model, kv, slab, loader, max(counts), _ready(config, model, nothing, loader))
    runner.launch(StepPlan(step=0, rows=rows)).result()


def _warm_up(runner: ModelRunner, config: EngineConfig, max_model_len: int) -> None:
    """Compile and touch every kernel once before the server says it is ready: prefill, decode, mixed."""
    usable = (runner.num_pages - 1) * config.page_size
    tuned = runner.ready.details.get("tuned_prefill_chunk")
    chunk = min(prefill_chunk(config, None if tuned is None else int(tuned)), max_model_len, usable)
    for counts in ([1], [chunk], [1] * min(8, config.max_running, config.max_batch_tokens, runner.num_pages - 1)):
        rows = _rows(counts, config.page_size)
        runner.launch(StepPlan(step=0, rows=rows)).result()
        for row in rows:
            runner.release_sequence(row.sequence_id)


def _ready(config: EngineConfig, model: CausalLM, plan: KvPlan, loader: AdapterLoader | NoAdapters) -> Ready:
    assert model.fingerprint is not None, "a model loaded from a directory has one"
    device = str(model.device)
    if model.device.type == "cuda":
        device = f"{device} ({torch.cuda.get_device_name(model.device)})"
    return Ready(
        fingerprint=model.fingerprint.hex,
        max_model_len=plan.max_model_len,
        vocab_size=model.spec.vocab_size,
        device=device,
        weights=config.weights,
        resident_weight_bytes=model.resident_weight_bytes,
        kv_pages=plan.pages,
        page_size=config.page_size,
        rank_units=loader.rank_units,
        max_rank=config.max_rank,
        details={
            "dtype": str(model.dtype).removeprefix("torch."),
            "torch": str(torch.__version__),
            "kv_bytes": str(plan.pages * plan.page_bytes),
            **{name: str(value) for name, value in model.details.items()},
            **{f"fingerprint.{name}": digest for name, digest in model.fingerprint.parts.items()},
        },
    )
