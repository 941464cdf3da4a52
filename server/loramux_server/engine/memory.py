"""Sizes the KV pool: what is left of the device once weights, slab and the largest step have had their share."""

import dataclasses
import math
from collections.abc import Callable

import torch

from loramux_server.engine.config import EngineConfig
from loramux_server.model.spec import ModelSpec


class BadModelLength(ValueError):
    """`max_model_len` is out of the model's range; the server refuses to start."""


class NotEnoughMemory(ValueError):
    """One request of the maximum length does not fit; the server refuses to start."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KvPlan:
    """Size of the pool.

    Attributes:
        pages: Usable pages (page 0, the trash page, comes on top).
        page_bytes: Bytes of one page over all layers.
        max_model_len: Longest prompt + output in tokens.
    """

    pages: int
    page_bytes: int
    max_model_len: int


def plan_kv(
    config: EngineConfig,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    largest_step: Callable[[], None],
) -> KvPlan:
    """Decide the number of pages.

    Args:
        config: Settings; an explicit `kv_pages` wins.
        spec: Base model.
        dtype: Element type of keys and values.
        device: Where the pool will live.
        largest_step: Runs the largest mixed step on a pool just big enough for it (CUDA only; it is measured).

    Raises:
        BadModelLength: `max_model_len` has no room for a prompt and an output token, or is longer than the rotary
            tables.
        NotEnoughMemory: The pool cannot hold one request of `max_model_len`.
    """
    if config.max_model_len is not None and not 2 <= config.max_model_len <= spec.max_position:
        raise BadModelLength(
            f"max_model_len: {config.max_model_len} is out of [2, {spec.max_position}]; this model was made for "
            f"sequences of up to {spec.max_position} tokens: lower --max-model-len or leave it out"
        )
    bytes_of_page = page_bytes(spec, config.page_size, dtype)
    wanted = config.max_model_len or spec.max_position
    if config.kv_pages is not None:
        pages = config.kv_pages
    elif device.type == "cpu":
        pages = -(-config.kv_tokens // config.page_size)
    else:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        largest_step()
        torch.cuda.synchronize(device)
        activation = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        # Other processes' memory counts as taken. Captured graphs keep the largest step's memory once more; the rest of
        # the reserve keeps fragmentation from ending a full pool.
        room = free - 2 * activation - int(total * (1.0 - config.gpu_memory_utilization))
        pages = max(room, 0) // bytes_of_page
    capacity = pages * config.page_size
    if config.max_model_len is None:
        wanted = min(wanted, capacity)
    if capacity < wanted or pages < 1:
        raise NotEnoughMemory(
            f"the KV pool holds {capacity} tokens ({pages} pages of {config.page_size}), but max_model_len is "
            f"{wanted}: lower --max-model-len, or give more pages "
            f"(--kv-pages, each takes {bytes_of_page / 2**20:.2f} MiB)"
        )
    return KvPlan(pages=pages, page_bytes=bytes_of_page, max_model_len=wanted)


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return spec.num_layers * 2 * page_size * spec.num_kv_heads * spec.head_dim * dtype.itemsize


def allocate_kv(
    spec: ModelSpec, *, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """One tensor `[pages + 1, 2, page_size, kv_heads, head_dim]` a layer; page 0 is the trash page.

    Zeros, not uninitialised memory: the trash page is read by padded rows, and masked loads must not meet signalling
    patterns from elsewhere on the device.

    Raises:
        NotEnoughMemory: The device has no room for so many pages.
    """
    shape = (pages + 1, 2, page_size, spec.num_kv_heads, spec.head_dim)
    try:
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain RuntimeError of the allocator on CPU
        size = math.prod(shape) * dtype.itemsize * spec.num_layers / 2**30
        raise NotEnoughMemory(
            f"the KV pool of {pages} pages needs {size:.1f} GiB on {device.type}, more than there is: lower --kv-pages"
        ) from error
