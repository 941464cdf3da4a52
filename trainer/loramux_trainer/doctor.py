"""`doctor`: what is installed, what the machine has, and whether a base can be trained on."""

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from loramux_trainer.base import choose_numerics, open_base
from loramux_trainer.data.codec import Codec, EncodingError
from loramux_trainer.data.conversation import Conversation, Message
from loramux_trainer.errors import ConfigError

RANGES = {
    "torch": ">=2.11,<3",
    "transformers": ">=5.17,<6",
    "peft": ">=0.21,<0.22",
    "trl": ">=1.16,<1.17",
    "accelerate": ">=1.2,<2",
    "bitsandbytes": ">=0.50.2,<0.51",
    "datasets": ">=4.7,<6",
    "tokenizers": ">=0.22,<1",
    "safetensors": ">=0.5,<1",
}
"""Versions that this trainer was made for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        good: Whether training can rely on it; None = told for information.
        text: What was found, and the way out if it is not good.
    """

    name: str
    good: bool | None
    text: str


def examine(base: Path | None) -> list[Check]:
    """Look at installation, machine and, if given, a base."""
    checks = [_version(name, ranges) for name, ranges in RANGES.items()]
    checks += [_device(), _network()]
    if base is not None:
        checks += _base(base)
    return checks


def _version(name: str, ranges: str) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, good=False, text=f"is not installed; pip install 'loramux[trainer]' brings {ranges}")
    good = SpecifierSet(ranges).contains(Version(found).base_version)
    return Check(name=name, good=good, text=found if good else f"{found} is outside {ranges}; install one inside")


def _device() -> Check:
    try:
        numerics = choose_numerics("auto")
    except ConfigError as error:
        return Check(name="device", good=False, text=str(error))
    if numerics.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(numerics.device)
        name = torch.cuda.get_device_name(numerics.device)
        return Check(name="device", good=True, text=f"{name}, {free >> 20} of {total >> 20} MiB free, bfloat16")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} CPUs"
    return Check(name="device", good=True, text=f"CPU ({platform.machine()}), {threads}, float32")


def _network() -> Check:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    return Check(name="hub", good=None, text="offline" if offline else "online: HF_HUB_OFFLINE is 0, as you asked")


def _base(directory: Path) -> list[Check]:
    try:
        base = open_base(directory)
        codec = Codec.from_directory(directory)
    except ConfigError as error:
        return [Check(name="base", good=False, text=str(error).removeprefix("base: "))]
    checks = [
        Check(
            name="base",
            good=True,
            text=f"{base.config.get('model_type')}, {base.shapes.num_layers} layers, fingerprint "
            f"{base.fingerprint.hex[:16]}",
        ),
        Check(
            name="weights",
            good=None if base.quantization == "none" else True,
            text="NF4"
            if base.quantization == "nf4"
            else "not quantized: adapters fit a server of this directory with --weights bf16; for an NF4 server run "
            "`loramux-server quantize` first",
        ),
    ]
    turn = (Message(role="user", content="Hello"), Message(role="assistant", content="Hi"))
    try:
        sequence = codec.sequences(Conversation(messages=turn, file=directory, line=0), 0)[0]
    except EncodingError as error:
        return [*checks, Check(name="template", good=False, text=str(error))]
    learned = codec.decode([label for label in sequence.labels if label >= 0])
    return [*checks, Check(name="template", good=True, text=f"an answer 'Hi' is learned as {learned!r}")]
