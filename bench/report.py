"""The JSON file of a run: what it ran on, how, and every row; written again after each row, so a cut run keeps them."""

import dataclasses
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from measure import Row

LIBRARIES = ("loramux", "torch", "triton", "transformers", "bitsandbytes", "peft", "vllm")


@dataclasses.dataclass(slots=True, kw_only=True)
class Report:
    """Results of one run.

    Attributes:
        environment: Card, driver and versions.
        arguments: The command line, as parsed.
        engines: Facts of each engine that was loaded, adapter times among them.
        rows: The table.
        path: File it is kept in; None = nowhere.
    """

    environment: Mapping[str, str]
    arguments: Mapping[str, Any]
    engines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    path: Path | None = None

    def add(self, row: Row) -> None:
        """Add a row and save."""
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file, if there is to be one."""
        if self.path is None:
            return
        plain = {
            "environment": dict(self.environment),
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "engines": self.engines,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        self.path.write_text(json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote."""
        plain = json.loads(path.read_text())
        rows = [Row(**row) for row in plain["rows"]]
        return cls(environment=plain["environment"], arguments=plain["arguments"], engines=plain["engines"], rows=rows)


def environment(device: str) -> dict[str, str]:
    """Card, driver, Python and the versions of what matters for speed, as far as they are here."""
    found = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["driver"] = _driver()
        found["cuda"] = str(torch.version.cuda)
    else:
        found["threads"] = str(torch.get_num_threads())
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def heading(environment: Mapping[str, str]) -> str:
    """One line that belongs above every table."""
    return "; ".join(value if name == "device" else f"{name} {value}" for name, value in environment.items())


def subject(report: Report) -> str:
    """What was served with which requests, in a line."""
    found = report.arguments
    model = found.get("model") or f"random {found.get('random')}"
    return f"{model}, prompt {found.get('prompt')}, new {found.get('new')}, rank {found.get('rank')}"


def versions_differ(reports: Sequence[Report]) -> bool:
    """Whether the runs' figures must not be put side by side."""
    return len({tuple(sorted(report.environment.items())) for report in reports}) > 1


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"Kernel Module\D*([0-9][0-9.]+)", text)
    return match.group(1) if match else "unknown"


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
