"""Times one decode step by kernel: where the milliseconds of a step go.

python bench/profile_step.py --work DIR --concurrency 64 --adapters 32      # after serve.py --work DIR
"""

import argparse
import collections
from pathlib import Path

import torch
from drive import EngineBench
from torch.profiler import ProfilerActivity, profile

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
    for count in sorted({0, arguments.adapters}):
        kernels, seconds = _profile(bench, arguments.concurrency, count)
        total = sum(time for _, time in kernels.values())
        launched = sum(count for count, _ in kernels.values()) // STEPS
        print(f"{arguments.concurrency} rows, {count or 'no'} adapters: {1000 * seconds:.2f} ms a step (host clock),")
        print(f"{total / STEPS / 1000:.2f} ms of kernels, {launched} launches")
        for name, (launches, time) in sorted(kernels.items(), key=lambda item: -item[1][1])[:18]:
            print(f"  {time / STEPS / 1000:7.3f} ms {launches // STEPS:5d} x {time / launches:7.1f} us  {name[:90]}")


def _profile(bench: EngineBench, rows: int, adapters: int) -> tuple[dict[str, tuple[int, float]], float]:
    import time

    bench.start(concurrency=rows, adapters=adapters, prompt=512, new=200)
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
            launches, total = kernels[event.name]
            kernels[event.name] = (launches + 1, total + event.device_time_total)
    bench.abort()
    return kernels, seconds


if __name__ == "__main__":
    main()
