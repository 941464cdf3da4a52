"""The command line of `serve.py`, and what it asks to combine with what."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from random_model import SHAPES
from workload import SAMPLING, Adapters, parse_adapters, slots_needed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is combined with what.

    Attributes:
        concurrency: Streams at once.
        adapters: Adapter mixes.
        sampling: Names of `SAMPLING`.
        shadows: Settings of `EngineConfig.shadow`.
        aheads: Settings of `EngineConfig.schedule_ahead`.
        slots: Slab slots, each with room for an adapter of the bench's rank.
        until: `time.monotonic()` after which no further setting starts.
    """

    concurrency: Sequence[int]
    adapters: Sequence[Adapters]
    sampling: Sequence[str]
    shadows: Sequence[bool | None]
    aheads: Sequence[bool | None]
    slots: int
    until: float

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Settings":
        """Read the command line.

        Raises:
            ValueError: A flag makes no sense.
        """
        concurrency = [int(value) for value in arguments.concurrency.split(",")]
        if min(concurrency) < 1:
            raise ValueError("--concurrency: streams are counted from 1")
        sampling = ["sampled"] if arguments.sampled else arguments.sampling.split(",")
        for name in sampling:
            if name not in SAMPLING:
                raise ValueError(f"--sampling {name!r}: choose from {', '.join(SAMPLING)}")
        if arguments.shadow == "both" and arguments.weights != "nf4":
            raise ValueError(f"--shadow both: weights {arguments.weights} have no shadow, only nf4 has")
        adapters = parse_adapters(
            arguments.adapters, zipf_adapters=arguments.zipf_adapters, zipf_slots=arguments.zipf_slots
        )
        return cls(
            concurrency=concurrency,
            adapters=adapters,
            sampling=sampling,
            shadows=_both(arguments.shadow),
            aheads=_both(arguments.schedule_ahead),
            slots=slots_needed(adapters),
            until=time.monotonic() + arguments.limit_s if arguments.limit_s else float("inf"),
        )

    def time_left(self, what: str) -> bool:
        """Whether another setting may start; says so where not."""
        if time.monotonic() < self.until:
            return True
        print(f"time limit: {what} not measured", flush=True)
        return False


def _both(choice: str | None) -> tuple[bool | None, ...]:
    return {None: (None,), "on": (True,), "off": (False,), "both": (False, True)}[choice]


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line of `serve.py`.

    Args:
        description: Shown above the flags.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="checkpoint directory")
    source.add_argument("--random", choices=sorted(SHAPES), default="tiny", help="random weights of these shapes")
    source.add_argument(
        "--from", dest="source", type=Path, action="append", metavar="FILE", help="measure nothing, read --json files"
    )
    parser.add_argument("--adapter", action="append", help="PEFT directory for --model; repeat")
    parser.add_argument("--weights", default="nf4", choices=["nf4", "bf16", "fp32"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--shadow", nargs="?", const="on", choices=["on", "off", "both"], help="keep a dequantized copy of the weights"
    )
    parser.add_argument("--no-shadow", dest="shadow", action="store_const", const="off")
    parser.add_argument(
        "--schedule-ahead", choices=["on", "off", "both"], help="launch a step before the last one's results are in"
    )
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--concurrency", default="1,4,16", help="streams at once, comma separated")
    parser.add_argument(
        "--adapters", default="0,1,4", help="distinct adapters, round robin; 0 = base; zipf = a long tail, in-process"
    )
    parser.add_argument("--zipf-adapters", type=int, default=200, metavar="N", help="adapters of the zipf run")
    parser.add_argument("--zipf-slots", type=int, default=32, metavar="N", help="slots that they share")
    parser.add_argument(
        "--adapter-files", type=int, default=64, metavar="N", help="distinct files; more random adapters are links"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="output tokens")
    parser.add_argument("--sampling", default="greedy", help=f"comma separated: {', '.join(SAMPLING)}")
    parser.add_argument("--sampled", action="store_true", help="the same as --sampling sampled")
    parser.add_argument(
        "--closed-loop", type=int, default=0, metavar="N", help="also N requests in a closed loop, the most adapters"
    )
    parser.add_argument("--adapter-times", action="store_true", help="also time first tokens of warm and cold adapters")
    parser.add_argument(
        "--against", choices=["peft"], help="also transformers + PEFT: the smallest and largest of each list, greedy"
    )
    parser.add_argument("--peft-new", type=int, default=17, metavar="N", help="output tokens of --against peft")
    parser.add_argument("--skip", choices=["engine", "grpc"], action="append", default=[])
    parser.add_argument("--work", type=Path, help="keep random checkpoints and adapters here for the next run")
    parser.add_argument("--limit-s", type=float, metavar="S", help="start no further setting after so many seconds")
    parser.add_argument("--json", "--out", type=Path, metavar="FILE", help="write every row, with card and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows; needs matplotlib")
    parser.add_argument(
        "--profile", type=Path, action="append", default=[], metavar="FILE", help="profile_step.py --json, for --plot"
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="LABEL=N:TOK_S,...",
        help="a decode line measured elsewhere, for --plot, e.g. 'vLLM 0.22=1:135,8:457,64:2125'",
    )
    return parser
