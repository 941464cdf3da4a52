"""Measures the engine in-process and the server through gRPC, and prints one table.

    python bench/serve.py                                   # tiny random model on CPU: what `make bench` runs
    python bench/serve.py --random qwen2.5-7b --device cuda --concurrency 1,8,32,64 --adapters 0,1,32
    python bench/serve.py --model ./checkpoint --weights nf4 --concurrency 1,8

Figures of different cards, versions or runs do not compare; record every result in bench/LOG.md.
"""

import argparse
import asyncio
import json
import platform
import tempfile
from pathlib import Path

import torch
from drive import EngineBench, ServerBench
from measure import Row, line, percentile, summarize, table
from random_model import SHAPES, write_adapter, write_checkpoint

from loramux_base.checkpoint import read_json
from loramux_server.engine.config import EngineConfig


def main() -> None:
    """Parse, build, run, print."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as temporary:
        work = arguments.work or Path(temporary)
        device = torch.device("cuda" if arguments.device == "cuda" else "cpu")
        counts = [int(value) for value in arguments.adapters.split(",")]
        if arguments.model is None:
            shape = SHAPES[arguments.random]
            model = work / f"{arguments.random}-{'nf4' if arguments.weights == 'nf4' else 'bf16'}"
            if not model.exists():
                write_checkpoint(model, shape, nf4=arguments.weights == "nf4", device=device)
            adapters = [work / f"adapter-r{arguments.rank}-{index}" for index in range(max(counts))]
            for index, path in enumerate(adapters):
                if not path.exists():
                    write_adapter(path, shape, rank=arguments.rank, seed=index, device=device)
        else:
            model, adapters = Path(arguments.model), [Path(path) for path in arguments.adapter or []]
            if max(counts) > len(adapters):
                raise SystemExit(f"--adapters {max(counts)} needs as many --adapter DIR, {len(adapters)} given")
        rows = _measure(arguments, model, adapters, counts)
    print(_environment(arguments))
    print(table(rows))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps([_plain(row) for row in rows], indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="checkpoint directory")
    source.add_argument("--random", choices=sorted(SHAPES), default="tiny", help="random weights of these shapes")
    parser.add_argument("--adapter", action="append", help="PEFT directory for --model; repeat")
    parser.add_argument("--weights", default="nf4", choices=["nf4", "bf16", "fp32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shadow", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--concurrency", default="1,4,16", help="streams at once, comma separated")
    parser.add_argument("--adapters", default="0,1,4", help="distinct adapters, round robin; 0 = base")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="output tokens")
    parser.add_argument(
        "--sampled", action="store_true", help="temperature 0.8, top_p 0.95, top_k 50 instead of greedy"
    )
    parser.add_argument(
        "--closed-loop", type=int, default=0, metavar="N", help="also N requests, closed loop, via gRPC"
    )
    parser.add_argument("--skip", choices=["engine", "grpc"], action="append", default=[])
    parser.add_argument("--work", type=Path, help="keep random checkpoints and adapters here for the next run")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace, model: Path, adapters: list[Path], counts: list[int]) -> list[Row]:
    concurrency = [int(value) for value in arguments.concurrency.split(",")]
    spec: dict[str, object] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50} if arguments.sampled else {}
    units = max(16, max(counts) * -(-arguments.rank // 16))
    rows: list[Row] = []
    shape = {"prompt": arguments.prompt, "new": arguments.new, "spec": spec}
    if "engine" not in arguments.skip:
        engine = EngineBench(
            EngineConfig(
                model=str(model),
                weights=arguments.weights,
                device=arguments.device,
                shadow=arguments.shadow,
                batch_invariant=arguments.batch_invariant,
                rank_units=units,
                max_slots=units,
            ),
            adapters,
        )
        print(json.dumps(engine.runner.ready.details))
        for count in counts:
            engine.run(concurrency=max(concurrency), adapters=count, prompt=arguments.prompt, new=4, spec=spec)
            for streams in concurrency:
                times = engine.run(concurrency=streams, adapters=count, **shape)
                rows.append(summarize(times, path="engine", adapters=str(count or "base")))
                print(line(rows[-1]), flush=True)
        print("ms a step by part:", {name: round(value, 2) for name, value in engine.step_parts().items()})
        engine.runner.close()
        del engine
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if "grpc" not in arguments.skip:
        rows.extend(asyncio.run(_measure_server(arguments, model, adapters, counts, concurrency, units, shape)))
    return rows


async def _measure_server(
    arguments: argparse.Namespace,
    model: Path,
    adapters: list[Path],
    counts: list[int],
    concurrency: list[int],
    units: int,
    shape: dict[str, object],
) -> list[Row]:
    flags = ["--weights", arguments.weights, "--device", arguments.device]
    flags += ["--rank-units", str(units), "--max-slots", str(units)]
    if arguments.shadow is not None:
        flags.append("--shadow" if arguments.shadow else "--no-shadow")
    if arguments.batch_invariant:
        flags.append("--batch-invariant")
    server = ServerBench(model, flags, adapters, vocab=read_json(model / "config.json")["vocab_size"])
    rows: list[Row] = []
    try:
        await server.upload()
        for count in counts:
            await server.run(
                concurrency=max(concurrency), adapters=count, prompt=arguments.prompt, new=4, spec=shape["spec"]
            )
            for streams in concurrency:
                times = await server.run(concurrency=streams, adapters=count, **shape)
                rows.append(summarize(times, path="grpc", adapters=str(count or "base")))
                print(line(rows[-1]), flush=True)
        if arguments.closed_loop:
            seconds, streams = await server.closed_loop(
                clients=max(concurrency),
                adapters=max(counts),
                prompt=arguments.prompt,
                new=arguments.new,
                requests=arguments.closed_loop,
            )
            gaps = [b[0] - a[0] for s in streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
            print(
                f"closed loop, {max(concurrency)} clients, {max(counts)} adapters: "
                f"{sum(s.tokens for s in streams) / seconds:,.0f} output tok/s, "
                f"inter-token p99 {1000 * percentile(gaps, 99):.0f} ms"
            )
    finally:
        server.close()
    return rows


def _environment(arguments: argparse.Namespace) -> str:
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, CPU"
    model = arguments.model or f"random {arguments.random}"
    return (
        f"{card}; torch {torch.__version__}; {model}, weights {arguments.weights}; prompt {arguments.prompt}, "
        f"new {arguments.new}, rank {arguments.rank}, {'sampled' if arguments.sampled else 'greedy'}"
    )


def _plain(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in Row.__slots__}


if __name__ == "__main__":
    main()
