"""Times one decode step by kernel: where the milliseconds of a step go.

python bench/profile_step.py --work DIR --concurrency 64 --adapters 32      # after serve.py --work DIR
"""

import argparse
import collections
import json
import time
from pathlib import Path

import torch
from drive import EngineBench
from report import environment, heading
from torch.profiler import ProfilerActivity, profile
from workload import Adapters

from loramux_server.engine.config import EngineConfig

STEPS = 8


def main() -> None:
    """Bring a batch into decode, profile a few steps, print kernels by total time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--random", default="qwen2.5-7b")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shadow", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the parts of each step, for serve.py --profile"
    )
    arguments = parser.parse_args()
    adapters = [arguments.work / f"adapter-r{arguments.rank}-{index}" for index in range(arguments.adapters)]
    units = max(16, arguments.adapters * -(-arguments.rank // 16))
    config = EngineConfig(
        model=str(arguments.work / f"{arguments.random}-nf4"),
        device="cuda",
        shadow=arguments.shadow,
        rank_units=units,
        max_slots=units,
    )
    bench = EngineBench(config, adapters)
    found = environment("cuda")
    print(heading(found))
    steps = []
    for count in sorted({0, arguments.adapters}):
        kernels, seconds = _profile(bench, arguments.concurrency, count)
        total = sum(spent for _, spent in kernels.values()) / STEPS / 1000
        launched = sum(launches for launches, _ in kernels.values()) // STEPS
        print(f"{arguments.concurrency} rows, {count or 'no'} adapters: {1000 * seconds:.2f} ms a step (host clock),")
        print(f"{total:.2f} ms of kernels in {launched} launches")
        for name, (launches, spent) in sorted(kernels.items(), key=lambda item: -item[1][1])[:18]:
            print(f"  {spent / STEPS / 1000:7.3f} ms {launches // STEPS:5d} x {spent / launches:7.1f} us  {name[:90]}")
        parts = by_part(kernels)
        print("by part, ms:", {name: round(value, 3) for name, value in parts.items()})
        weights = "nf4+shadow" if arguments.shadow else "nf4"
        steps.append({"rows": arguments.concurrency, "adapters": count, "weights": weights, "parts": parts})
        steps[-1] |= {"step_ms": 1000 * seconds, "kernel_ms": total, "launches": launched}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"environment": found, "steps": steps}, indent=1) + "\n")
    bench.runner.close()


PARTS = {
    "LoRA": ("_shrink", "_expand", "_plan"),
    "attention": ("_attend", "_combine"),
    "sampler": ("_pick", "topk", "argmax", "ArgMax", "radix", "Radix", "bitonic", "logsumexp"),
    "norm, rope, activation": ("_rms_norm", "_rope", "_glu"),
    "copies": ("Memcpy", "Memset", "copy", "Copy", "index"),
    "dequantize": ("equantize",),
    "NF4 product": ("4bit", "nf4", "NF4"),
    "dense product": ("gemm", "cutlass", "nvjet", "gemv", "splitK", "wgmma"),
}
"""Parts of a step, each with pieces of its kernels' names; the first that fits counts."""


def by_part(kernels: dict[str, tuple[int, float]]) -> dict[str, float]:
    """Milliseconds a step by part; what fits no part is `other`.

    Args:
        kernels: Launches and microseconds over all steps, by kernel name.
    """
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for name, (_, spent) in kernels.items():
        part = next((part for part, pieces in PARTS.items() if any(piece in name for piece in pieces)), "other")
        parts[part] += spent / STEPS / 1000
    return {part: value for part, value in parts.items() if value}


def _profile(bench: EngineBench, rows: int, adapters: int) -> tuple[dict[str, tuple[int, float]], float]:
    bench.start(concurrency=rows, adapters=Adapters(count=adapters), prompt=512, new=200)
    while bench.decoding < rows:
        bench.pump()
    for _ in range(4):
        bench.pump()
    began = time.perf_counter()
    for _ in range(STEPS):
        bench.pump()
    seconds = (time.perf_counter() - began) / STEPS
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            bench.pump()
        torch.cuda.synchronize()
    kernels: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches, spent = kernels[event.name]
            kernels[event.name] = (launches + 1, spent + event.device_time_total)
    bench.abort()
    return dict(kernels), seconds


if __name__ == "__main__":
    main()
