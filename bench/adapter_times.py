"""What an adapter that is not in the slab adds to the first token: from the host's memory, and from the store."""

import ctypes
import mmap
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from drive import EngineBench

SAMPLES = 5


def measure_adapter_times(bench: EngineBench, adapters: list[Path], *, prompt: int) -> dict[str, object]:
    """Time the first token of single requests, by where the adapter is.

    To be called before anything else used the adapters: the engine's host memory keeps what it once read. Each timing
    is of one request to an engine that has nothing else to do, so reading begins with its arrival.

    Args:
        bench: An engine whose slab holds none of the adapters.
        adapters: Directories in the order of the bench's adapters; the last one warms up, up to five others are timed.
        prompt: Prompt tokens.

    Returns:
        Medians in ms: `base_ttft_ms`, `resident_ttft_ms`; over the latter `first_added_ms` (never used by this engine,
        files as they were found, page cache dropped), `warm_added_ms` (unloaded before: from host memory),
        `cold_added_ms` (dropped, made known again, page cache dropped: from the serving blob if the engine writes
        them), each with its `..._max_ms`; `files` and `cold_files`, what lay in an adapter's directory at the start and
        when it was cold; `warm_hits`, how many of the warm ones host memory had; `page_cache_left`, the share of the
        files' pages that the kernel kept although it was asked to drop them (1.0 = cold is no colder than warm);
        `samples`.
    """
    bench.one(None, prompt=prompt)
    last = len(adapters) - 1
    for _ in range(2):
        bench.one(last, prompt=prompt)
    bench.unload(last)
    timed = range(min(SAMPLES, last))
    files = sorted(entry.name for entry in adapters[0].iterdir())
    base = [bench.one(None, prompt=prompt) for _ in range(SAMPLES)]
    times: dict[str, list[float]] = {"first": [], "warm": [], "cold": []}
    left = []
    for index in timed:
        left.append(drop_page_cache(adapters[index]))
        times["first"].append(bench.one(index, prompt=prompt))
    resident = [bench.one(index, prompt=prompt) for index in timed]
    bench.runner.slab.wait_idle()
    hits = bench.engine.stats().host_hits
    for index in timed:
        bench.unload(index)
        times["warm"].append(bench.one(index, prompt=prompt))
    hits = bench.engine.stats().host_hits - hits
    cold_files = sorted(entry.name for entry in adapters[0].iterdir())
    for index in timed:
        bench.forget(index)
        left.append(drop_page_cache(adapters[index]))
        times["cold"].append(bench.one(index, prompt=prompt))
    usual = statistics.median(resident)
    found: dict[str, object] = {
        "base_ttft_ms": 1000 * statistics.median(base),
        "resident_ttft_ms": 1000 * usual,
    }
    for name, values in times.items():
        found[f"{name}_added_ms"] = 1000 * (statistics.median(values) - usual)
        found[f"{name}_max_ms"] = 1000 * (max(values) - usual)
    return {
        **found,
        "files": files,
        "cold_files": cold_files,
        "warm_hits": hits,
        "page_cache_left": statistics.mean(left),
        "samples": len(timed),
    }


def drop_page_cache(directory: Path) -> float:
    """Ask the kernel to forget the files of a directory.

    Returns:
        Share of their pages that is still cached: on a file system in memory, or without the call (macOS), all.
    """
    if not hasattr(os, "posix_fadvise"):
        return 1.0
    left, pages = 0, 0
    for path in sorted(entry for entry in directory.rglob("*") if entry.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages are kept
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            cached, total = _cached_pages(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
        left, pages = left + cached, pages + total
    return left / pages if pages else 0.0


def _cached_pages(descriptor: int, size: int) -> tuple[int, int]:
    """Pages of a file in the page cache, and its pages; Linux's mincore."""
    if size == 0:
        return 0, 0
    count = -(-size // mmap.PAGESIZE)
    answers = (ctypes.c_ubyte * count)()
    # Copy-on-write and never written: a writable view of it gives the address, and maps the file's own pages.
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        mincore: Callable[..., int] = ctypes.CDLL(None, use_errno=True).mincore
        failed = mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), answers)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(answer & 1 for answer in answers), count
