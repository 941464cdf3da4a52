"""`loramux-server tune`: measure which backend of the NF4 product, and which prefill chunk, is fastest on this card."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from loramux_base.checkpoint import read_json
from loramux_server.config import ConfigError
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.out_of_memory import is_out_of_memory
from loramux_server.engine.plan import OutOfMemory
from loramux_server.engine.prefill_times import ChunkTime, best_chunk, chunk_ladder, time_chunks
from loramux_server.engine.runner import build_runner
from loramux_server.model.linear import TuningTable
from loramux_server.model.load import default_dtype
from loramux_server.model.product_times import CudaTimer, Measured, choices, measure, product_shapes
from loramux_server.model.spec import ModelSpec
from loramux_server.model.tuning import (
    TuningFile,
    TuningFileError,
    cuda_backends,
    model_key,
    read_tuning,
    tuning_path,
)

_PAGE_SIZE = 16


def tune(directory: Path, *, dry_run: bool = False) -> str:
    """Measure and write the card's table.

    What the table has of other shapes and models stays, where it was measured with the same versions; a table of
    other versions, or one that cannot be read, is replaced.

    Args:
        directory: Of the base.
        dry_run: Measure and report, write nothing.

    Returns:
        Lines of text: microseconds by backend, prefill rate by chunk, and where the table lies.

    Raises:
        ConfigError: No CUDA device is here, or the model cannot be served.
        TuningFileError: The table cannot be written.
    """
    try:
        spec = ModelSpec.from_config(read_json(directory / "config.json"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"--model {directory}: {error}") from error
    if not torch.cuda.is_available():
        raise ConfigError("tune needs a CUDA device: on the CPU there is one product, nothing to choose from")
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    path = tuning_path(card)
    if not dry_run:
        _must_be_writable(path)
    with torch.inference_mode():
        measured = measure(product_shapes(spec), CudaTimer(device, default_dtype(device)), backends=cuda_backends())
    torch.cuda.empty_cache()
    rows = choices(measured)
    try:
        times = prefill_times(directory, spec, TuningTable(rows), device="cuda")
    except ConfigError as error:
        if dry_run:
            raise
        # What took minutes to measure is not lost with it.
        written = "; ".join(write(TuningFile.of(card, rows), path))
        raise ConfigError(f"{error}; no prefill chunk was measured, the backends were: {written}") from error
    chunks = {model_key(spec): best_chunk(times)} if times else {}
    lines = [report(measured), *chunk_report(times)]
    if dry_run:
        lines.append(f"nothing written, as asked; {path} would be")
    else:
        lines.extend(write(TuningFile.of(card, rows, chunks=chunks), path))
    return "\n".join(lines)


def prefill_times(directory: Path, spec: ModelSpec, table: TuningTable, *, device: str) -> list[ChunkTime]:
    """Load the base and time its prefill by chunk.

    Args:
        directory: Of the base.
        spec: Its flags.
        table: Choices of the product's backend that it is served with.
        device: `cuda`, or `cpu` in tests.

    Returns:
        A time for each chunk; none for a model whose sequences are shorter than the smallest one.

    Raises:
        ConfigError: It cannot be loaded here, or the device has no room for it.
    """
    chunks = chunk_ladder(spec.max_position - 1)
    if not chunks:
        return []
    longest = chunks[-1]
    config = EngineConfig(
        model=str(directory),
        device=device,
        shadow=False,
        max_model_len=longest + 1,
        page_size=_PAGE_SIZE,
        kv_pages=longest // _PAGE_SIZE + 1,
        max_running=1,
        max_batch_tokens=longest,
        max_rank=16,
        rank_units=1,
        max_slots=1,
        host_adapter_bytes=0,
        self_test=False,
    )
    try:
        runner = build_runner(config, table=table)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--model {directory}: {error}") from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _no_room(directory) from error
    try:
        return time_chunks(runner, chunks)
    except OutOfMemory as error:
        raise _no_room(directory) from error
    finally:
        runner.close()


def write(found: TuningFile, path: Path) -> list[str]:
    """Join with what the file has and still holds, and write; returns lines that say what was done.

    Args:
        found: What was measured.
        path: Of the card's table.

    Raises:
        TuningFileError: It cannot be written.
    """
    lines = []
    try:
        older = read_tuning(path)
    except TuningFileError as error:
        older = None
        lines.append(f"replaced what could not be used: {error}")
    if older is not None and (strange := older.strangeness(found.card)):
        older = None
        lines.append(f"replaced a table that was measured with {strange}")
    (found if older is None else found.joined(older)).save(path)
    return [*lines, f"wrote {path}"]


def report(measured: Sequence[Measured]) -> str:
    """A line a product: N, K, M, microseconds by backend, the choice."""
    table, device = TuningTable(choices(measured)), torch.device("cuda")
    return "\n".join(
        f"{one.n:6} x {one.k:6}  M = {one.m:5}  "
        + "  ".join(f"{backend} {1e6 * seconds:8.1f} us" for backend, seconds in one.seconds.items())
        + f"  -> {table.choose(one.n, one.k, one.m, device, packed=table.packs(one.n, one.k))}"
        for one in measured
    )


def chunk_report(times: Sequence[ChunkTime]) -> list[str]:
    """A line a prefill chunk: tokens, milliseconds a step, tokens/s, the choice."""
    if not times:
        return ["prefill chunk: not measured, the model's sequences are shorter than the smallest one"]
    best = best_chunk(times)
    return [
        f"prefill chunk {one.tokens:5}  {1000 * one.step_s:8.2f} ms a step  {one.rate:9,.0f} tokens/s"
        + ("  -> chosen" if one.tokens == best else "")
        for one in times
    ]


def _no_room(directory: Path) -> ConfigError:
    return ConfigError(
        f"--model {directory}: the device ran out of memory while its prefill was timed; end what else uses the "
        "device, or take a smaller base"
    )


def _must_be_writable(path: Path) -> None:
    """Before minutes are spent on measuring."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TuningFileError(f"{path}: {error}; set XDG_CACHE_HOME to a folder that can be written") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TuningFileError(f"{folder} cannot be written; set XDG_CACHE_HOME to one that can")
