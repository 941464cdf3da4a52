"""Times the operations of a 7B layer and the sampler on a CUDA card, against the memory or arithmetic floor.

    python bench/kernel_times.py --json kernels.json --plot kernels.png
    python bench/kernel_times.py --only lora,attention --limit-s 120
    python bench/kernel_times.py --from kernels.json --plot kernels.png     # draws only; needs no device

Each operation runs in a CUDA graph over copies of its operands that exceed the L2 cache; the time is the median of
several replays by CUDA events. Floors: bytes over the card's memory rate, operations over its bfloat16 rate, both from
the data sheet (`kernel_results.CARDS`; another card is held against an H100). The sampler is timed twice: as the host
calls it in a step, and its kernel alone.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from kernel_cases import GROUPS, Bench
from kernel_results import H100, Card, Result, card_of, layer_sums, result, table
from kernel_sizes import SEVEN_B
from kernel_timer import CudaTimer, Timer
from plot import NoMatplotlib, draw_kernels
from report import environment, heading


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; the exit status: 2 without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help=f"comma separated: {', '.join(GROUPS)}")
    parser.add_argument("--limit-s", type=float, default=float("inf"), metavar="S", help="start no case after that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every result, with card and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw time over floor; needs matplotlib")
    parser.add_argument(
        "--from", dest="source", type=Path, action="append", metavar="FILE", help="measure nothing, read --json files"
    )
    arguments = parser.parse_args(argv)
    groups = arguments.only.split(",")
    for group in groups:
        if group not in GROUPS:
            parser.error(f"--only {group!r}: choose from {', '.join(GROUPS)}")
    if arguments.source:
        files = [json.loads(path.read_text()) for path in arguments.source]
        found = files[0]["environment"]
        results = [Result(**one) for file in files for one in file["results"] if one["group"] in groups]
        print_results(results, heading(found))
        save(results, found, json_path=arguments.json, plot_path=arguments.plot)
        return 0
    if not torch.cuda.is_available():
        print("bench/kernel_times.py needs a CUDA device; none is here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    bench = Bench(sizes=SEVEN_B, device=device, dtype=torch.bfloat16)
    found = environment("cuda")
    card = card_of(found["device"])
    found["floors"] = str(card)
    results = measure(bench, groups, CudaTimer(device), limit_s=arguments.limit_s, card=card)
    print_results(results, heading(found))
    save(results, found, json_path=arguments.json, plot_path=arguments.plot)
    return 0


def measure(
    bench: Bench, groups: Sequence[str], timer: Timer, *, limit_s: float = float("inf"), card: Card = H100
) -> list[Result]:
    """Time every case of the groups.

    Args:
        bench: Makes the cases.
        groups: Of `GROUPS`.
        timer: How.
        limit_s: After so many seconds no case is started; how many were left out is said.
        card: Whose floors the times are held against.
    """
    until, skipped = time.monotonic() + limit_s, 0
    results: list[Result] = []
    for group in groups:
        for case in bench.cases(group):
            if time.monotonic() >= until:
                skipped += 1
                continue
            seconds = timer(case.calls(), graph=case.graph)
            about = {"group": group, "case": case.name, "rows": case.rows, "work": case.work, "graph": case.graph}
            results.append(result(seconds=seconds, card=card, **about))
    if skipped:
        print(f"time limit: {skipped} cases not measured", flush=True)
    return results


def print_results(results: Sequence[Result], title: str) -> None:
    """Print a table a group, and the sums of a layer's products."""
    print(title)
    print(table(results))
    for backend, rows, us, floor in layer_sums(results, group="linear", products=4):
        print(f"four products of a layer, {backend}, {rows} rows: {us:.0f} us, floor {floor:.0f}")


def save(results: Sequence[Result], found: dict[str, str], *, json_path: Path | None, plot_path: Path | None) -> None:
    """Write what was asked for."""
    plain = [dataclasses.asdict(one) for one in results]
    if json_path is not None:
        json_path.write_text(json.dumps({"environment": found, "results": plain}, indent=1) + "\n")
    if plot_path is not None and results:
        try:
            draw_kernels(plain, plot_path, title=heading(found))
        except NoMatplotlib as error:
            print(f"no plot: {error}")


if __name__ == "__main__":
    sys.exit(main())
