"""Command line: `loramux-train doctor | train | eval | publish`.

Exit status: 0 done, 2 configuration or data, 3 out of memory, 4 not finite, 5 gate failed, 6 publication refused, 129,
130 and 143 stopped by a signal.
"""

import loramux_trainer.environment  # noqa: F401 - before anything that imports huggingface_hub  # isort: skip

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from loramux_trainer.errors import ConfigError, GateFailed, TrainerError
from loramux_trainer.screen import console

TOKEN_VARIABLE = "LORAMUX_TOKEN"
"""Environment variable with the bearer token of `publish`."""

app = typer.Typer(
    name="loramux-train",
    help="Train LoRA adapters for a loramux server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = console("stdout")
_err = console("stderr")

_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


@app.command()
def doctor(
    base: Annotated[Path | None, typer.Option(help="Directory of a base model to look at.")] = None,
    as_json: _Json = False,
) -> None:
    """Show versions, device and, with --base, whether a base can be trained on."""
    from loramux_trainer.doctor import examine

    checks = examine(base)
    if as_json:
        print(json.dumps([{"name": item.name, "good": item.good, "text": item.text} for item in checks], indent=2))
    else:
        for item in checks:
            mark = {True: "[green]ok[/green]  ", False: "[red]bad[/red] ", None: "info"}[item.good]
            _out.print(f"{mark} {item.name:<13} {escape(item.text)}", highlight=False, soft_wrap=True)
    if any(item.good is False for item in checks):
        raise ConfigError("something above has to be put right before training")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, see the trainer's README.")],
    option: Annotated[
        list[str] | None, typer.Option("-o", metavar="SETTING=VALUE", help="Override a setting: -o lora.r=32.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the same run.")] = False,
    as_json: _Json = False,
) -> None:
    """Train an adapter."""
    from loramux_trainer.config_file import load_config

    settings = load_config(config, option or [])
    from loramux_trainer.run import train as run  # after the configuration: these imports take seconds

    result = run(settings, resume=resume, console=_err)
    if as_json:
        facts = {"adapter": str(result.adapter), "digest": result.digest, "seconds": result.seconds}
        print(json.dumps({**facts, **result.manifest}))
        return
    if evaluation := result.manifest.get("evaluation"):
        _print_evaluation(evaluation)
    _out.print(
        f"adapter {result.adapter}, version {result.digest[:12]}, {result.seconds:.1f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command("eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory of a run, or the run's directory.")],
    files: Annotated[list[Path], typer.Argument(help="Held-out conversations, JSONL or JSON.")],
    base: Annotated[Path, typer.Option(help="Directory of the base model, or `demo`, the embedded one.")],
    device: _Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a forward pass.")] = 8,
    min_gain: Annotated[
        float | None,
        typer.Option(help="Exit with 5 unless the loss is lower than the base's by more than so many nats a token."),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Compare base and adapter on files, teacher-forced."""
    from loramux_base.embedded import DEMO_NAME
    from loramux_trainer.assess import assess
    from loramux_trainer.config_file import demo_base

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: {device!r} is none of auto, cpu, cuda")
    if min_gain is not None and not math.isfinite(min_gain):
        raise ConfigError(f"--min-gain: {min_gain} is no number to compare with; give nats a token, for example 0.1")
    if str(base) == DEMO_NAME:
        base = demo_base("--base")
    result = assess(_directory(adapter), base, files, device=device, batch_size=batch_size)
    if as_json:
        print(json.dumps(result.plain()))
    else:
        _print_evaluation(result.plain())
    gain = result.base.loss - result.adapter.loss
    if min_gain is not None and not gain > min_gain:
        raise GateFailed(f"the adapter lowers the loss by {gain:.4f} nats a token, not by more than {min_gain:g}")


@app.command()
def publish(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory of a run, or the run's directory.")],
    server: Annotated[str, typer.Option(help="host:port of the server.")],
    name: Annotated[str, typer.Option(help="Adapter that the version belongs to; made if needed.")],
    tenant: Annotated[str | None, typer.Option(help="Tenant to act for; absent: the token's own.")] = None,
    promote: Annotated[bool, typer.Option(help="Give the version all traffic.")] = True,
    allow_other_template: Annotated[
        bool, typer.Option("--allow-other-template", help="Publish to a server with another chat template.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Upload an adapter to a running server and promote it. The bearer token comes from LORAMUX_TOKEN."""
    from loramux_trainer.publish import Target
    from loramux_trainer.publish import publish as send

    target = Target(
        server=server,
        name=name,
        tenant=tenant,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        promote=promote,
        allow_other_template=allow_other_template,
    )
    version = send(_directory(adapter), target)
    if as_json:
        print(json.dumps({"version": version.name, "digest": version.digest, "promoted": promote}))
    else:
        action = "serves all traffic of" if promote else "is uploaded for"
        text = f"{version.name} ({version.digest[:12]}) {action} {name}"
        _out.print(text, markup=False, highlight=False, soft_wrap=True)


def _directory(path: Path) -> Path:
    """The adapter's directory, also if the run's was given."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def _print_evaluation(evaluation: dict[str, dict[str, float]]) -> None:
    table = Table("", "loss", "perplexity", "accuracy", "loss tokens")
    for name in ("base", "adapter"):
        item = evaluation[name]
        perplexity = "overflow" if item["perplexity"] is None else f"{item['perplexity']:.4g}"
        table.add_row(name, f"{item['loss']:.4f}", perplexity, f"{item['accuracy']:.4f}", str(item["loss_tokens"]))
    _out.print(table)


def main() -> None:
    """Entry point: one line a problem on stderr and the error's exit status; a stack trace for our own bugs only."""
    try:
        app()
    except TrainerError as error:
        for line in str(error).splitlines():
            _err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _err.print("interrupted")
        sys.exit(130)
