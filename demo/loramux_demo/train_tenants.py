"""Train the tenants' adapters: `python -m loramux_demo.train_tenants --base DIR --out DIR`.

Each is what `loramux-train train` makes of the tenant's conversations; their names are those of `tenants.TENANTS`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loramux_demo import tenants
from loramux_demo.paths import BASE, EMBEDDED_ADAPTERS

CONVERSATIONS = 600
"""Conversations that each tenant brings."""

_CONFIG = """\
base: {base}
output: {output}
data:
  train: [{data}]
  max_length: 384
lora: {{r: 8, alpha: 16}}
train: {{epochs: 2, batch_size: 16, learning_rate: 2.0e-3}}
"""


def write_job(tenant: str, directory: Path, *, base: Path) -> Path:
    """Write a tenant's conversations and the trainer's configuration.

    Args:
        tenant: Key of `tenants.TENANTS`.
        directory: Gets `<tenant>.jsonl`, `<tenant>.yaml` and, when trained, the run `<tenant>`.
        base: Quantized base.

    Returns:
        The configuration's path.
    """
    data = directory / f"{tenant}.jsonl"
    tenants.write_jsonl(data, tenants.training_conversations(tenant, CONVERSATIONS, seed=1))
    config = directory / f"{tenant}.yaml"
    config.write_text(_CONFIG.format(base=base.resolve(), output=directory / tenant, data=data), encoding="utf-8")
    return config


def train(names: Sequence[str], out: Path, *, base: Path) -> None:
    """Train adapters one after the other and copy each to `out/<tenant>`, which must not exist.

    Raises:
        subprocess.CalledProcessError: A training failed; the trainer has said why.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="loramux-tenants-") as scratch:
        for name in names:
            config = write_job(name, Path(scratch), base=base)
            subprocess.run([sys.executable, "-m", "loramux_trainer", "train", str(config)], check=True)
            shutil.copytree(Path(scratch) / name / "adapter", out / name)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loramux_demo.train_tenants", description="Train the demo tenants' adapters."
    )
    parser.add_argument("--base", type=Path, default=BASE, help="quantized base (the embedded one)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapters")
    parser.add_argument("--tenants", nargs="*", choices=list(tenants.TENANTS), default=list(EMBEDDED_ADAPTERS))
    options = parser.parse_args(arguments)
    taken = [name for name in options.tenants if (options.out / name).exists()]
    if taken:
        parser.error(f"--out {options.out} holds {', '.join(taken)} already; give a new directory")
    train(options.tenants, options.out, base=options.base)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
