"""Which adapter each request of a run uses, how it samples, and the adapter directories that this needs."""

import dataclasses
import itertools
import json
import os
import random
from pathlib import Path

import torch
from random_model import Shape, write_adapter

ZIPF_EXPONENT = 1.1

SAMPLING: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
    "logprobs": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "logprobs": 3},
}
"""Sampling fields by name; the drivers give each request its own seed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """Adapters of a run.

    Attributes:
        count: Distinct adapters that may be asked for; 0 = base only.
        zipf: Drawn by popularity (share of rank r is proportional to r^-1.1) instead of round robin.
        slots: Slots of the slab, for the label of a Zipf run.
    """

    count: int
    zipf: bool = False
    slots: int = 0

    @property
    def label(self) -> str:
        """As the table shows it."""
        if self.zipf:
            return f"zipf{self.count}/{self.slots}"
        return str(self.count or "base")

    def picks(self, requests: int, *, seed: int) -> list[int | None]:
        """Adapter index of each request; None = base.

        Args:
            requests: How many.
            seed: Of a Zipf draw.
        """
        if not self.count:
            return [None] * requests
        if not self.zipf:
            return [index % self.count for index in range(requests)]
        shares = list(itertools.accumulate(rank**-ZIPF_EXPONENT for rank in range(1, self.count + 1)))
        return list(random.Random(seed).choices(range(self.count), cum_weights=shares, k=requests))


def parse_adapters(text: str, *, zipf_adapters: int, zipf_slots: int) -> list[Adapters]:
    """Runs of `--adapters`: comma-separated counts and `zipf`.

    Raises:
        ValueError: An entry is neither.
    """
    found = []
    for entry in text.split(","):
        if entry.strip() == "zipf":
            found.append(Adapters(count=zipf_adapters, zipf=True, slots=zipf_slots))
        elif entry.strip().isdecimal():
            found.append(Adapters(count=int(entry)))
        else:
            raise ValueError(f"--adapters {entry!r}: give counts and `zipf`, comma separated, e.g. 0,1,8,32,zipf")
    return found


def slots_needed(runs: list[Adapters]) -> int:
    """Slots that hold every round-robin run whole and give a Zipf run its own."""
    return max(16, *(run.slots if run.zipf else run.count for run in runs))


def write_adapters(work: Path, shape: Shape, *, count: int, rank: int, files: int, device: torch.device) -> list[Path]:
    """Adapter directories under `work`, made where missing.

    Args:
        work: Where.
        shape: Base model.
        count: Directories.
        rank: Of all.
        files: Distinct tensor files; further directories are hard links with another alpha, versions of their own.
        device: Where random numbers are drawn.
    """
    paths = [work / f"adapter-r{rank}-{index}" for index in range(count)]
    for index, path in enumerate(paths):
        if path.exists():
            continue
        if index < files:
            write_adapter(path, shape, rank=rank, seed=index, device=device)
        else:
            _link_adapter(paths[index % files], path, alpha=2 * rank + index // files)
    return paths


def _link_adapter(source: Path, target: Path, *, alpha: int) -> None:
    target.mkdir()
    os.link(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}) + "\n")
