"""Measures what an engine takes of its device while it is built, and predicts it from the settings."""

import os

import msgspec
import torch

from loramux_base.shapes import BaseShapes
from loramux_server.engine.capacity import plan_capacity
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.footprint import Footprint
from loramux_server.model.spec import ModelSpec


class MemoryMeter:
    """Bytes that came to the device since the last reading.

    On CUDA the allocator is asked, so that what nobody counts shows, too; on the CPU, where nobody can be asked,
    tensors tell their own sizes.

    Args:
        device: Where the engine lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._last = torch.cuda.memory_allocated(device) if self._cuda else 0

    def take(self, counted: int) -> int:
        """Bytes allocated and kept since the last call; on the CPU those `counted`."""
        if not self._cuda:
            return counted
        now = torch.cuda.memory_allocated(self._device)
        taken, self._last = now - self._last, now
        return taken

    def steps(self, kept: int) -> int | None:
        """Bytes that torch holds beyond what was `kept` on purpose: for steps and graphs. None on the CPU."""
        return torch.cuda.memory_reserved(self._device) - kept if self._cuda else None

    def totals(self) -> dict[str, str]:
        """What the system says, for `Ready.details`: memory of the device in use, or resident in this process."""
        if self._cuda:
            free, total = torch.cuda.mem_get_info(self._device)
            return {"actual.device_bytes": str(total - free), "device_bytes": str(total)}
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        return {"actual.process_bytes": str(pages * os.sysconf("SC_PAGE_SIZE"))}


def predicted(config: EngineConfig, spec: ModelSpec, shapes: BaseShapes | None, device: torch.device) -> Footprint:
    """What `loramux-server plan` says of these settings.

    Args:
        config: Settings.
        spec: Base model.
        shapes: Its linear layers; None = it takes no adapters.
        device: Where the engine lives.
    """
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    settings = msgspec.structs.replace(config, device=device.type)
    capacity = plan_capacity(settings, spec, shapes, memory=memory)
    pages = max(0, capacity.pages)
    return Footprint(
        weight_bytes=capacity.weights,
        adapter_bytes=capacity.slab + capacity.staging,
        kv_bytes=(pages + 1) * capacity.page,
        step_bytes=capacity.workspace,
        kv_pages=pages,
    )
