"""Command line of the server.

Exit codes: 0 ended as asked; 1 an unexpected error, or the engine's crash-loop limit; 2 bad usage or a setting, model,
store or port that cannot be used; 130 interrupted by Ctrl-C before the server took the signals over. A signal that
comes while the engine still starts is an end as asked: 0.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux_server.config import OPTIONS, ConfigError, ServerConfig, load_config, show_config
from loramux_server.option import Option
from loramux_server.version import server_version

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class UsageError(Exception):
    """Something that the operator has to change; the message is the one line that they see."""


# What the settings come to that nobody sets and that have no fixed default.
_UNSET = {
    "probe": "none",
    "model_name": "last part of --model",
    "max_model_len": "the model's own",
    "max_output_tokens": "--max-model-len",
    "kv_pages": "what the memory holds on CUDA, 2048 on CPU",
    "host_adapter_gib": "2 on CUDA, 0.25 on CPU, at most a quarter of the machine's",
    "schedule_ahead": "on CUDA",
    "shadow": "on CPU",
    "threads": "physical cores",
    "tls_cert": "none, plaintext",
    "tls_key": "none",
    "tls_client_ca": "none, no certificate is asked for",
    "otlp_endpoint": "none",
    "replica_id": "host name",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None = those of the process.

    Returns:
        The exit code.
    """
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    try:
        return _run(parsed)
    except (ConfigError, UsageError) as error:
        print(f"loramux-server: {_one_line(str(error))}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="loramux-server", description="Serve one base model and many LoRA adapters.")
    parser.add_argument("--version", action="version", version=f"loramux-server {server_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_settings(commands.add_parser("serve", help="serve a model", argument_default=argparse.SUPPRESS))
    quantize = commands.add_parser("quantize", help="write a checkpoint with its linear weights in NF4")
    quantize.add_argument("source", metavar="SRC", help="directory of the checkpoint, or a hub id")
    quantize.add_argument("target", metavar="DST", help="directory to write; must not exist")
    tune = commands.add_parser(
        "tune",
        help="measure which product and which prefill chunk are fastest on this GPU, for a model's shapes",
        description="Measure on this GPU which backend of the NF4 product is fastest at each batch size, and which "
        "prefill chunk a model wants, and keep both for every server of this card. What was measured holds for one "
        "version each of torch and bitsandbytes: tune again when one of them changes.",
    )
    tune.add_argument(
        "--model", required=True, metavar="STR", help="directory of the base, a hub id, or `demo`, embedded"
    )
    tune.add_argument("--dry-run", action="store_true", help="measure and report, write nothing")
    plan = commands.add_parser(
        "plan",
        help="say what fits on a device, before anything is loaded",
        description="Say what fits on a device, from the model's config alone. A server prints these figures at its "
        "start beside what they came to, reports them as `planned.*` and `actual.*` in its log, and warns of a part "
        "that takes over 5 % more than predicted.",
        argument_default=argparse.SUPPRESS,
    )
    plan.add_argument(
        "--adapters",
        dest="planned_adapters",
        type=_positive,
        metavar="INT",
        help="adapters resident at once (default: --max-slots)",
    )
    plan.add_argument("--rank", type=_positive, metavar="INT", help="rank of each of them (default 16)")
    plan.add_argument(
        "--context",
        type=_positive,
        metavar="INT",
        help="tokens of a request, prompt and output together (default: --max-model-len, or the model's)",
    )
    plan.add_argument("--memory", type=float, metavar="GIB", help="memory of the device (default: of this machine's)")
    _add_settings(plan, without="adapters")  # a number there
    config = commands.add_parser("config", help="check or show settings")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_settings(actions.add_parser("check", help="check settings", argument_default=argparse.SUPPRESS))
    _add_settings(actions.add_parser("show", help="show settings in effect", argument_default=argparse.SUPPRESS))
    return parser


def _add_settings(parser: argparse.ArgumentParser, *, without: str = "") -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings")
    for option in OPTIONS:
        if option.name != without:
            _add_option(parser, option)


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.kind is bool:
        default = " (default)" if option.default else ""
        if option.name in _UNSET:
            default = f" (default {_UNSET[option.name]})"
        parser.add_argument(option.flag, dest=option.name, action="store_true", help=text + default)
        if option.negative is not None:
            parser.add_argument(option.negative, dest=option.name, action="store_false", help=f"do not {text}")
        return
    if isinstance(option.default, str | int | float):
        text += f" (default {option.default})"
    elif option.name in _UNSET:
        text += f" (default: {_UNSET[option.name]})"
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.kind.__name__.upper()
    parser.add_argument(option.flag, dest=option.name, metavar=metavar, help=text)


def _run(parsed: argparse.Namespace) -> int:
    if parsed.command == "quantize":
        return _quantize(parsed.source, parsed.target)
    if parsed.command == "tune":
        return _tune(parsed.model, dry_run=parsed.dry_run)
    config = _config(parsed)
    if parsed.command == "plan":
        return _plan(config, parsed)
    if parsed.command == "config":
        if parsed.action == "show":
            print(show_config(config), end="")
        else:
            print("settings are valid")
        return EXIT_OK
    return _serve(config)


def _config(parsed: argparse.Namespace) -> ServerConfig:
    names = {option.name for option in OPTIONS}
    flags: dict[str, Any] = {name: value for name, value in vars(parsed).items() if name in names}
    file = getattr(parsed, "config", None) or os.environ.get("LORAMUX_CONFIG")
    return load_config(flags, environment=os.environ, file=None if file is None else Path(file))


def _serve(config: ServerConfig) -> int:
    # gRPC's own log lines repeat what we report; the variable counts before its import only.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from loramux_server.run import run_until_stopped
    from loramux_server.startup import ServeError
    from loramux_server.telemetry.json_log import configure_logging

    configure_logging(config.log_level)
    try:
        return asyncio.run(run_until_stopped(config))
    except ServeError as error:
        raise UsageError(str(error)) from error


def _quantize(source: str, target: str) -> int:
    from loramux_server.hub import resolve_model

    directory = resolve_model(source, flag="SRC")
    destination = Path(target)
    if destination.exists():
        raise UsageError(f"DST {target} exists; name a new directory")
    from loramux_server.model.quantize import quantize_checkpoint  # torch, only where it is needed

    def progress(done: int, total: int, name: str) -> None:
        print(f"\r{done}/{total} {name[:60]:<60}", end="", file=sys.stderr, flush=True)

    try:
        quantize_checkpoint(directory, destination, progress=progress)
    except (ValueError, OSError) as error:
        raise UsageError(f"cannot quantize {source}: {error}") from error
    print(f"\nwrote {target}", file=sys.stderr)
    return EXIT_OK


def _plan(config: ServerConfig, parsed: argparse.Namespace) -> int:
    from loramux_server.hub import resolve_model
    from loramux_server.plan_command import plan  # torch and transformers, only where they are needed

    memory = getattr(parsed, "memory", None)
    if memory is not None and not 0 < memory < 1e6:
        raise UsageError(f"--memory {memory:g}: give the GiB of the device, for example 80")
    directory = resolve_model(config.model, flag="--model")
    text = plan(
        config,
        directory,
        adapters=getattr(parsed, "planned_adapters", None),
        rank=getattr(parsed, "rank", 16),
        context=getattr(parsed, "context", None),
        memory=memory,
    )
    print(text)
    return EXIT_OK


def _tune(model: str, *, dry_run: bool) -> int:
    from loramux_server.hub import resolve_model
    from loramux_server.model.tuning import TuningFileError  # torch, only where it is needed
    from loramux_server.tune_command import tune

    try:
        print(tune(resolve_model(model), dry_run=dry_run))
    except TuningFileError as error:
        raise UsageError(str(error)) from error
    return EXIT_OK


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
