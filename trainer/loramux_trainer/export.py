"""Writes the adapter directory: PEFT files, our manifest and a card; it appears under its name only when it is whole.

The manifest holds no times, paths or machine names: equal runs give equal bytes, hence the same version on the server.
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from loramux_base.adapter import (
    CONFIG_NAME,
    MANIFEST_NAME,
    TENSORS_NAME,
    AdapterFormatError,
    read_layout,
    read_manifest,
    version_digest,
)
from loramux_base.adapter_digests import DIGESTS_KEY, check_digests, file_digests
from loramux_base.manifest import FORMAT_VERSION
from loramux_trainer.base import Base
from loramux_trainer.config import MAX_RANK
from loramux_trainer.digests import check_files
from loramux_trainer.errors import ConfigError, NonFinite

CARD_NAME = "README.md"


def export_adapter(model: PeftModel, base: Base, target: Path, facts: Mapping[str, Any]) -> str:
    """Write an adapter and check it as the server will.

    Args:
        model: Trained model.
        base: Its base.
        target: New directory.
        facts: Further keys of the manifest; plain JSON data.

    Returns:
        The version digest that the server will give it.

    Raises:
        ConfigError: `target` exists.
        NonFinite: A trained number is NaN or infinite; nothing was written.
    """
    if target.exists():
        raise ConfigError(f"{target}: exists; give a new directory or remove it first")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NonFinite(f"{name} holds NaN or infinity; no adapter was written. Lower train.learning_rate")
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(str(partial), safe_serialization=True, save_embedding_layers=False)
        _rewrite_config(partial / CONFIG_NAME, base)
        manifest = {
            "format_version": FORMAT_VERSION,
            "base_fingerprint": base.fingerprint.hex,
            "base_parts": dict(base.fingerprint.parts),
            DIGESTS_KEY: file_digests(partial),
            **facts,
        }
        _write(partial / MANIFEST_NAME, _json(manifest))
        _write(partial / CARD_NAME, _card(base, manifest))
        _check(partial, base)
        digest = version_digest(partial)
        for file in partial.iterdir():
            _sync(file)
        os.rename(partial, target)
        _sync(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return digest


def read_facts(directory: Path) -> dict[str, Any]:
    """The manifest of an adapter, checked, as plain data.

    Raises:
        ConfigError: No adapter directory of ours.
    """
    try:
        manifest = read_manifest(directory)
    except AdapterFormatError as error:
        raise ConfigError(f"{directory}: {error}") from error
    if manifest is None or not (directory / TENSORS_NAME).is_file():
        raise ConfigError(
            f"{directory}: has no {MANIFEST_NAME} or no {TENSORS_NAME}; give the adapter directory that a run wrote"
        )
    try:
        check_files(directory, manifest)
    except AdapterFormatError as error:
        raise ConfigError(f"{directory}: {error}") from error
    return {"base_fingerprint": manifest.base_fingerprint, "base_parts": dict(manifest.base_parts), **manifest.extra}


def check_adapter(directory: Path, base: Base) -> None:
    """Refuse an adapter that is damaged or of another base.

    Raises:
        ConfigError: Names what is wrong, or the parts of the base that differ.
    """
    try:
        manifest = read_manifest(directory)
        if manifest is not None:
            manifest.check_base(base.fingerprint.hex, base.fingerprint.parts)
        read_layout(directory, base.shapes, max_rank=MAX_RANK)
    except AdapterFormatError as error:
        raise ConfigError(f"{directory}: {error}") from error


def _check(directory: Path, base: Base) -> None:
    """What the server checks; a failure here is a bug of ours, not of the user's data."""
    rank = json.loads((directory / CONFIG_NAME).read_bytes())["r"]
    layout = read_layout(directory, base.shapes, max_rank=rank)
    assert layout.modules, "the adapter targets nothing"
    manifest = read_manifest(directory)
    assert manifest is not None
    manifest.check_base(base.fingerprint.hex, base.fingerprint.parts)
    check_digests(directory, manifest)


def _rewrite_config(file: Path, base: Base) -> None:
    """Sort what PEFT keeps in sets, and name the base without the path that it has on this machine."""
    config = json.loads(file.read_bytes())
    config["base_model_name_or_path"] = base.directory.absolute().name
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    _write(file, _json(config))


def _card(base: Base, manifest: Mapping[str, Any]) -> str:
    lora, data = manifest.get("lora", {}), manifest.get("data", {})
    lines = [
        "---",
        "library_name: peft",
        "tags: [lora, loramux]",
        "---",
        f"# LoRA adapter for {base.directory.absolute().name}",
        "",
        f"- Base fingerprint: `{base.fingerprint.hex}`, weights {base.quantization}; it fits no other base.",
        f"- Rank {lora.get('r')}, alpha {lora.get('alpha')}, on {', '.join(lora.get('modules', []))}.",
        f"- Trained on {data.get('train', {}).get('conversations')} conversations "
        f"({data.get('train', {}).get('loss_tokens')} assistant tokens) in {manifest.get('steps')} steps, "
        f"seed {manifest.get('seed')}.",
    ]
    evaluation = manifest.get("evaluation")
    if evaluation:
        lines += [
            "",
            f"Teacher-forced on {evaluation['adapter']['conversations']} held-out conversations, a token:",
            "",
            "| | loss | accuracy |",
            "| --- | --- | --- |",
            *(
                f"| {name} | {evaluation[name]['loss']:.4f} | {evaluation[name]['accuracy']:.4f} |"
                for name in ("base", "adapter")
            ),
        ]
    return "\n".join(lines) + "\n"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
