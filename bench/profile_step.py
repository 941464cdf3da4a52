"""Times one decode step by kernel: where its milliseconds go, their sum against the step, and the gaps.

    python bench/profile_step.py --work DIR --concurrency 64 --adapters 32 --json profile.json
    python bench/profile_step.py --from profile.json --plot profile.png      # draws only; needs no device

The step's time is the host's clock over steps without the profiler; kernels are those of further steps under it. The
random model and the adapters are made under --work where they are missing, as `serve.py --work` makes them. On the CPU
(--device cpu, for a try of the command) operations stand for kernels. Launches do not overlap here unless --overlap is
given, so that a kernel's time is its own; the server's step is shorter by what overlaps.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from drive import EngineBench
from plot import NoMatplotlib, draw_profile
from random_model import SHAPES, write_checkpoint
from report import environment, heading
from step_profile import Kernel, StepProfile, step_profile
from torch.profiler import ProfilerActivity, profile
from workload import Adapters, write_adapters

from loramux_server.engine.config import EngineConfig

CLOCKED_STEPS = 32
PROFILED_STEPS = 8


def main() -> None:
    """Bring a batch into decode, time and profile a few steps, print; or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="random checkpoint and adapters, kept for the next run")
    parser.add_argument("--random", default="qwen2.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--shadow", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument(
        "--overlap", action="store_true", help="let launches overlap, as in the server: kernels' times then hold waits"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step, also for serve.py --profile")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the steps; needs matplotlib")
    parser.add_argument(
        "--from", dest="source", type=Path, action="append", metavar="FILE", help="measure nothing, read --json files"
    )
    arguments = parser.parse_args()
    if arguments.source:
        files = [json.loads(path.read_text()) for path in arguments.source]
        found, steps = files[0]["environment"], [step for file in files for step in file["steps"]]
        print(heading(found))
        for step in steps:
            print(read_profile(step).report())
    else:
        if arguments.work is None:
            parser.error("--work is missing: the folder of the random checkpoint and the adapters")
        found = environment(arguments.device)
        print(heading(found))
        if not arguments.overlap:
            os.environ["LORAMUX_KERNEL_OVERLAP"] = "0"
        steps = _measure(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"environment": found, "steps": steps}, indent=1) + "\n")
    if arguments.plot is not None:
        try:
            draw_profile(steps, arguments.plot, title=heading(found))
        except NoMatplotlib as error:
            print(f"no plot: {error}")


def read_profile(step: dict[str, Any]) -> StepProfile:
    """A step of a --json file."""
    fields = {name: value for name, value in step.items() if name not in ("gap_ms", "gap_share")}
    return StepProfile(**{**fields, "kernels": [tuple(kernel) for kernel in step["kernels"]]})


def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device, shape = torch.device(arguments.device), SHAPES[arguments.random]
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.work / f"{arguments.random}-nf4"
    if not model.exists():
        write_checkpoint(model, shape, nf4=True, device=device)
    adapters = write_adapters(
        arguments.work, shape, count=arguments.adapters, rank=arguments.rank, files=64, device=device
    )
    units = max(16, arguments.adapters * -(-arguments.rank // 16))
    config = EngineConfig(
        model=str(model), device=arguments.device, shadow=arguments.shadow, rank_units=units, max_slots=units
    )
    bench = EngineBench(config, adapters)
    shadow = arguments.device == "cpu" if arguments.shadow is None else arguments.shadow
    steps = []
    try:
        for count in sorted({0, arguments.adapters}):
            kernels, seconds = _profile(bench, arguments, count)
            found = step_profile(
                kernels,
                steps=PROFILED_STEPS,
                step_s=seconds,
                rows=arguments.concurrency,
                adapters=count,
                weights="nf4+shadow" if shadow else "nf4",
            )
            print(found.report(), flush=True)
            steps.append(found.plain())
    finally:
        bench.runner.close()
    return steps


def _profile(bench: EngineBench, arguments: argparse.Namespace, adapters: int) -> tuple[list[Kernel], float]:
    """Kernels of the profiled steps, and seconds of a step that is not profiled."""
    rows = arguments.concurrency
    # Whoever was prefilled first has decoded in every step since: one a chunk at most.
    new = 64 + CLOCKED_STEPS + PROFILED_STEPS + rows * (1 + arguments.prompt // 128)
    bench.start(concurrency=rows, adapters=Adapters(count=adapters), prompt=arguments.prompt, new=new)
    while bench.decoding < rows:
        bench.pump()
    for _ in range(4):
        bench.pump()
    _synchronize(arguments.device)
    began = time.perf_counter()
    for _ in range(CLOCKED_STEPS):
        bench.pump()
    _synchronize(arguments.device)
    seconds = (time.perf_counter() - began) / CLOCKED_STEPS
    cuda = arguments.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED_STEPS):
            bench.pump()
        _synchronize(arguments.device)
    bench.abort()
    return _kernels(profiler.events() or [], cuda=cuda), seconds


def _kernels(events: Iterable[Any], *, cuda: bool) -> list[Kernel]:
    """Launches on the device; on the CPU operations that no other calls."""
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return [
        Kernel(name=event.name, begin=event.time_range.start, end=event.time_range.end)
        for event in events
        if event.device_type == wanted and (cuda or event.cpu_parent is None)
    ]


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
