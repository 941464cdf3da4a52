"""`loramux-server plan`: what fits on a device, told from the config before anything is loaded."""

from pathlib import Path

import msgspec
import torch

from loramux_base.checkpoint import read_json
from loramux_base.shapes import UnsupportedBase, base_shapes
from loramux_server.config import ConfigError, ServerConfig
from loramux_server.engine.capacity import Capacity, plan_capacity
from loramux_server.engine.config import EngineConfig
from loramux_server.engine_process import engine_config
from loramux_server.model.slab import UNIT_ROWS
from loramux_server.model.spec import ModelSpec, UnsupportedModel

GIB = 2**30


def plan(
    config: ServerConfig,
    directory: Path,
    *,
    adapters: int | None,
    rank: int,
    context: int | None,
    memory: float | None,
) -> str:
    """Describe what the settings take.

    Args:
        config: Settings of the server.
        directory: Of the base.
        adapters: Adapters resident at once; None = `max_slots` and `rank_units` as set.
        rank: Of each of them.
        context: Tokens of a request, prompt and output; None = `max_model_len`, or what the model was made for.
        memory: GiB of the device; None = of this machine's.

    Returns:
        Lines of text.

    Raises:
        ConfigError: The model cannot be served, nothing fits, or the device's memory is unknown.
    """
    try:
        raw = read_json(directory / "config.json")
        spec = ModelSpec.from_config(raw)
    except (UnsupportedModel, ValueError, OSError) as error:
        raise ConfigError(f"--model {directory}: {error}") from error
    try:
        shapes = base_shapes(raw)
    except UnsupportedBase:
        shapes = None
    engine = engine_config(config, directory)
    if engine.device == "auto":
        known = torch.cuda.is_available() or memory is not None
        engine = msgspec.structs.replace(engine, device="cuda" if known else "cpu")
    if adapters is not None:
        units = -(-rank // UNIT_ROWS)
        engine = msgspec.structs.replace(
            engine,
            max_slots=adapters,
            rank_units=adapters * units,
            max_rank=max(engine.max_rank, units * UNIT_ROWS),
        )
    total = _memory(memory, engine)
    capacity = plan_capacity(engine, spec, shapes, memory=total)
    tokens = context or config.max_model_len or spec.max_position
    if tokens > spec.max_position:
        raise ConfigError(f"--context {tokens}: this model was made for sequences of up to {spec.max_position} tokens")
    return _report(capacity, engine, config, tokens, shapes is not None)


def _memory(given: float | None, engine: EngineConfig) -> int:
    if given is not None:
        return int(given * GIB)
    if engine.device == "cpu":
        return 0
    if not torch.cuda.is_available():
        raise ConfigError("--memory is missing: no CUDA device is here to ask; give the GiB of yours, for example 80")
    return int(torch.cuda.mem_get_info()[1])


def _report(capacity: Capacity, engine: EngineConfig, config: ServerConfig, context: int, adapters: bool) -> str:
    at_once = min(capacity.requests(context), config.max_running)
    part = f"{100 * engine.gpu_memory_utilization:.0f} % of " if engine.device == "cuda" else ""
    share = f", {part}{capacity.memory / GIB:.1f} GiB" if capacity.memory else ""
    rows = [
        (f"device {engine.device}{share}, weights {engine.weights}", None),
        ("base model", capacity.weights),
        (
            f"adapters: {engine.max_slots} slots, {engine.rank_units} rank units of {UNIT_ROWS} rows, "
            f"{capacity.unit / 2**20:.1f} MiB each"
            if adapters
            else "adapters: this base takes none",
            capacity.slab + capacity.staging,
        ),
        (f"a step of {engine.max_batch_tokens} tokens, {engine.max_running} rows (estimate)", capacity.workspace),
        (
            f"KV cache: {max(0, capacity.pages)} pages of {capacity.page_size} tokens = {capacity.tokens} tokens",
            max(0, capacity.pages) * capacity.page,
        ),
    ]
    lines = [text if size is None else f"  {size / GIB:8.2f} GiB  {text}" for text, size in rows]
    if adapters and capacity.host:
        kept = capacity.host // capacity.unit
        lines.append(f"beside it, in the host's memory: {capacity.host / GIB:.2f} GiB, {kept} rank units of adapters")
    if capacity.requests(context) < 1:
        lines.append(
            f"one request of {context} tokens does not fit: lower --context, --rank-units or --max-batch-tokens, or "
            "take a device with more memory"
        )
    elif capacity.memory and capacity.needed > capacity.memory:
        lines.append(
            f"together {capacity.needed / GIB:.2f} GiB, more than the device has: lower --kv-pages or "
            "--rank-units, or take a device with more memory"
        )
    else:
        bound = " (--max-running)" if at_once == config.max_running else ""
        lines.append(f"{at_once} requests of {context} tokens run at once{bound}; more wait")
        flags = f"--max-model-len {context} --max-slots {engine.max_slots} --rank-units {engine.rank_units}"
        if engine.max_rank > config.max_rank:
            flags += f" --max-rank {engine.max_rank}"
        lines.append(f"serve with: {flags}")
    return "\n".join(lines)
