"""Measures the engine in-process and the server through gRPC, and prints one table.

    python bench/serve.py                                   # tiny random model on CPU: what `make bench` runs
    python bench/serve.py --random qwen2.5-7b --device cuda --concurrency 1,8,32,64 --adapters 0,1,8,32,zipf
    python bench/serve.py --sampling greedy,sampled,logprobs --schedule-ahead both --shadow both --json rows.json
    python bench/serve.py --model ./checkpoint --weights nf4 --concurrency 1,8
    python bench/serve.py --from rows.json --from more.json --profile profile.json --plot rows.png   # draws only

One loaded engine runs every combination of launch order, adapters, sampling and concurrency; --shadow both loads a
second one after it. Figures of different cards, versions or runs do not compare; record every result in bench/LOG.md.
"""

import argparse
import asyncio
import dataclasses
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from adapter_times import measure_adapter_times
from against_peft import PeftBench
from drive import EngineBench, ServerBench, parts_between
from measure import Row, line, parts_table, summarize, summarize_closed, table
from plot import NoMatplotlib, Points, draw_serving, parse_reference
from random_model import SHAPES, write_checkpoint
from report import Report, environment, heading, subject, versions_differ
from settings import Settings, make_parser
from workload import SAMPLING, Adapters, write_adapters

from loramux_base.adapter import version_digest
from loramux_base.checkpoint import read_json
from loramux_server.engine.config import EngineConfig
from loramux_server.engine.model_runner import ModelRunner


def main() -> None:
    """Parse, build, run, print."""
    parser = make_parser(__doc__ or "")
    arguments = parser.parse_args()
    try:
        references = [parse_reference(text) for text in arguments.reference]
    except ValueError as error:
        parser.error(f"--reference {error}")
    if arguments.source:
        _redraw(arguments, references)
        return
    try:
        settings = Settings.of(arguments)
    except ValueError as error:
        parser.error(str(error))
    report = Report(environment=environment(arguments.device), arguments=dict(vars(arguments)), path=arguments.json)
    print(heading(report.environment))
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as temporary:
        model, adapters = _prepare(arguments, settings, arguments.work or Path(temporary))
        _measure(arguments, settings, model, adapters, report)
        if arguments.against == "peft" and settings.time_left("PEFT"):
            _measure_peft(arguments, settings, model, adapters, report)
    report.save()
    _print(report.rows, report)
    if arguments.plot is not None:
        _draw(report.rows, report, arguments, references)


def _prepare(arguments: argparse.Namespace, settings: Settings, work: Path) -> tuple[Path, list[Path]]:
    count = max(run.count for run in settings.adapters)
    if arguments.model is not None:
        adapters = [Path(path) for path in arguments.adapter or []]
        if count > len(adapters):
            raise SystemExit(f"--adapters {count} needs as many --adapter DIR, {len(adapters)} given")
        return Path(arguments.model), adapters
    device = torch.device(arguments.device)
    shape = SHAPES[arguments.random]
    model = work / f"{arguments.random}-{'nf4' if arguments.weights == 'nf4' else 'bf16'}"
    if not model.exists():
        write_checkpoint(model, shape, nf4=arguments.weights == "nf4", device=device)
    files = max(1, arguments.adapter_files)
    return model, write_adapters(work, shape, count=count, rank=arguments.rank, files=files, device=device)


def _measure(
    arguments: argparse.Namespace, settings: Settings, model: Path, adapters: list[Path], report: Report
) -> None:
    digests = [version_digest(path) for path in adapters] if "engine" not in arguments.skip else []
    for shadow in settings.shadows:
        weights = _weights_label(arguments, shadow)
        if "engine" not in arguments.skip and settings.time_left(f"engine, {weights}"):
            _measure_engines(arguments, settings, model, adapters, digests, shadow, report)
            _free_device_memory()
        if "grpc" in arguments.skip:
            continue
        for ahead in settings.aheads:
            if settings.time_left(f"gRPC, {weights}"):
                asyncio.run(_measure_server(arguments, settings, model, adapters, shadow, ahead, report))


def _measure_engines(
    arguments: argparse.Namespace,
    settings: Settings,
    model: Path,
    adapters: list[Path],
    digests: list[str],
    shadow: bool | None,
    report: Report,
) -> None:
    """All settings on one loaded runner; each launch order has an engine of its own over it."""
    runner: ModelRunner | None = None
    for ahead in settings.aheads:
        config = EngineConfig(
            model=str(model),
            weights=arguments.weights,
            device=arguments.device,
            shadow=shadow,
            schedule_ahead=ahead,
            batch_invariant=arguments.batch_invariant,
            rank_units=settings.slots * _units(arguments),
            max_slots=settings.slots,
            serving_blobs=arguments.adapter_times and arguments.model is None,
        )
        bench = EngineBench(config, adapters, runner=runner, digests=digests)
        if runner is None:
            runner = bench.runner
            facts = {"weights": _weights_label(arguments, shadow), "ready": dict(runner.ready.details)}
            facts["resident_weight_bytes"] = runner.ready.resident_weight_bytes
            facts["kv_pages"] = runner.ready.kv_pages
            print(json.dumps(facts), flush=True)
            report.engines.append(facts)
            if arguments.adapter_times and len(adapters) > 1:
                facts["adapter_times"] = measure_adapter_times(bench, adapters, prompt=arguments.prompt)
                print("adapter times:", _rounded(facts["adapter_times"]), flush=True)
        common = {
            "weights": _weights_label(arguments, shadow),
            "ahead": runner.asynchronous if ahead is None else ahead,
            "resident_weight_bytes": runner.ready.resident_weight_bytes,
        }
        for row in _engine_rows(arguments, settings, bench):
            _add(report, dataclasses.replace(row, **common))
        print(f"ms a step by part, ahead {common['ahead']}:", _rounded(bench.step_parts()), flush=True)
        bench.leave()
    assert runner is not None
    runner.close()


def _engine_rows(arguments: argparse.Namespace, settings: Settings, bench: EngineBench) -> Iterator[Row]:
    most, shape = max(settings.concurrency), {"prompt": arguments.prompt, "new": arguments.new}
    for adapters, sampling in itertools.product(settings.adapters, settings.sampling):
        spec = SAMPLING[sampling]
        if adapters.zipf:
            requests = arguments.closed_loop or 3 * most
            if settings.time_left(f"engine, {adapters.label}, {sampling}"):
                bench.run(concurrency=most, adapters=adapters, prompt=arguments.prompt, new=4, spec=spec)
                before = bench.step_seconds()
                seconds, streams = bench.closed_loop(
                    clients=most, adapters=adapters, requests=requests, spec=spec, **shape
                )
                row = summarize_closed(streams, seconds=seconds, clients=most, path="engine", adapters=adapters.label)
                parts = parts_between(*before, *bench.step_seconds())
                yield dataclasses.replace(row, sampling=sampling, parts=parts)
            continue
        for streams_at_once in settings.concurrency:
            if not settings.time_left(f"engine, {adapters.label}, {sampling}, n={streams_at_once}"):
                continue
            if streams_at_once == settings.concurrency[0]:
                # Loads the adapters and meets every shape once.
                bench.run(concurrency=most, adapters=adapters, prompt=arguments.prompt, new=4, spec=spec)
            before = bench.step_seconds()
            times = bench.run(concurrency=streams_at_once, adapters=adapters, spec=spec, **shape)
            row = summarize(times, path="engine", adapters=adapters.label)
            yield dataclasses.replace(row, sampling=sampling, parts=parts_between(*before, *bench.step_seconds()))
    largest = _largest(settings)
    if arguments.closed_loop and settings.time_left("engine, closed loop"):
        sampling = settings.sampling[0]
        seconds, streams = bench.closed_loop(
            clients=most, adapters=largest, requests=arguments.closed_loop, spec=SAMPLING[sampling], **shape
        )
        row = summarize_closed(streams, seconds=seconds, clients=most, path="engine", adapters=largest.label)
        yield dataclasses.replace(row, sampling=sampling)


async def _measure_server(
    arguments: argparse.Namespace,
    settings: Settings,
    model: Path,
    adapters: list[Path],
    shadow: bool | None,
    ahead: bool | None,
    report: Report,
) -> None:
    began = time.monotonic()
    flags = _server_flags(arguments, settings, shadow, ahead)
    runs = [run for run in settings.adapters if not run.zipf]
    uploaded = adapters[: max((run.count for run in runs), default=0)]
    server = ServerBench(model, flags, uploaded, vocab=read_json(model / "config.json")["vocab_size"])
    on = arguments.device == "cuda" if ahead is None else ahead
    common = {"weights": _weights_label(arguments, shadow), "ahead": on}
    # The same settings keep the same bytes, in whichever process.
    for facts in report.engines:
        if facts["weights"] == common["weights"]:
            common["resident_weight_bytes"] = facts["resident_weight_bytes"]
    most, shape = max(settings.concurrency), {"prompt": arguments.prompt, "new": arguments.new}
    try:
        print(f"server up after {time.monotonic() - began:.1f} s", flush=True)
        await server.upload()
        for run, sampling in itertools.product(runs, settings.sampling):
            spec = SAMPLING[sampling]
            for streams_at_once in settings.concurrency:
                if not settings.time_left(f"gRPC, {run.label}, {sampling}, n={streams_at_once}"):
                    continue
                if streams_at_once == settings.concurrency[0]:
                    await server.run(concurrency=most, adapters=run, prompt=arguments.prompt, new=4, spec=spec)
                times = await server.run(concurrency=streams_at_once, adapters=run, spec=spec, **shape)
                row = summarize(times, path="grpc", adapters=run.label)
                _add(report, dataclasses.replace(row, sampling=sampling, **common))
        if arguments.closed_loop and settings.time_left("gRPC, closed loop"):
            sampling, largest = settings.sampling[0], _largest(settings)
            seconds, streams = await server.closed_loop(
                clients=most, adapters=largest, requests=arguments.closed_loop, spec=SAMPLING[sampling], **shape
            )
            row = summarize_closed(streams, seconds=seconds, clients=most, path="grpc", adapters=largest.label)
            _add(report, dataclasses.replace(row, sampling=sampling, **common))
            print(
                f"closed loop, {most} clients, {largest.label} adapters: {row.output:,.0f} output tok/s, "
                f"inter-token p99 {row.gap_p99:.0f} ms"
            )
    finally:
        server.close()


def _measure_peft(
    arguments: argparse.Namespace, settings: Settings, model: Path, adapters: list[Path], report: Report
) -> None:
    """A few settings only: it decodes tens of times slower."""
    runs = sorted((run for run in settings.adapters if not run.zipf), key=lambda run: run.count)
    ends = list(dict.fromkeys([*runs[:1], *runs[-1:]]))
    bench = PeftBench(model, adapters[: max((run.count for run in ends), default=0)], device=arguments.device)
    try:
        for run, streams in itertools.product(ends, sorted({min(settings.concurrency), max(settings.concurrency)})):
            if not settings.time_left(f"PEFT, {run.label}, n={streams}"):
                continue
            shape = {"concurrency": streams, "adapters": run, "prompt": arguments.prompt}
            shape |= {"spec": SAMPLING["greedy"], "sampling": "greedy"}
            bench.run(new=2, **shape)
            row = bench.run(new=arguments.peft_new, **shape)
            _add(report, dataclasses.replace(row, weights=str(arguments.weights)))
    finally:
        bench.close()


def _server_flags(
    arguments: argparse.Namespace, settings: Settings, shadow: bool | None, ahead: bool | None
) -> list[str]:
    flags = ["--weights", arguments.weights, "--device", arguments.device]
    flags += ["--rank-units", str(settings.slots * _units(arguments)), "--max-slots", str(settings.slots)]
    if shadow is not None:
        flags.append("--shadow" if shadow else "--no-shadow")
    if ahead is not None:
        flags.append("--schedule-ahead" if ahead else "--no-schedule-ahead")
    if arguments.batch_invariant:
        flags.append("--batch-invariant")
    return flags


def _largest(settings: Settings) -> Adapters:
    """The round-robin run with the most adapters; the base where there is none."""
    return max((run for run in settings.adapters if not run.zipf), key=lambda run: run.count, default=Adapters(count=0))


def _units(arguments: argparse.Namespace) -> int:
    return -(-int(arguments.rank) // 16)


def _weights_label(arguments: argparse.Namespace, shadow: bool | None) -> str:
    kept = arguments.device == "cpu" if shadow is None else shadow
    return f"{arguments.weights}+shadow" if kept and arguments.weights == "nf4" else str(arguments.weights)


def _free_device_memory() -> None:
    """Give the memory of a closed runner back, for the next engine or a server process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        kept = torch.cuda.memory_allocated()
        if kept > 2**30:
            print(f"{kept / 2**30:.1f} GiB of device memory are still held by this process", flush=True)


def _add(report: Report, row: Row) -> None:
    report.add(row)
    print(line(row), flush=True)


def _rounded(values: dict[str, object]) -> dict[str, object]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}


def _redraw(arguments: argparse.Namespace, references: Sequence[tuple[str, Points]]) -> None:
    reports = [Report.load(path) for path in arguments.source]
    rows = [row for report in reports for row in report.rows]
    if versions_differ(reports):
        print("the files come from different cards or versions: their rows do not compare")
    _print(rows, reports[0])
    if arguments.plot is not None:
        _draw(rows, reports[0], arguments, references)


def _print(rows: Sequence[Row], report: Report) -> None:
    print(heading(report.environment))
    print(subject(report))
    print(table(rows))
    if parts := parts_table(rows):
        print(f"\nHost time a step, prefill steps included:\n\n{parts}")


def _draw(
    rows: Sequence[Row], report: Report, arguments: argparse.Namespace, references: Sequence[tuple[str, Points]]
) -> None:
    profiles = [step for path in arguments.profile for step in json.loads(path.read_text())["steps"]]
    title = f"{subject(report)}\n{heading(report.environment)}"
    try:
        draw_serving(rows, arguments.plot, title=title, profiles=profiles, references=references)
    except NoMatplotlib as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    main()
