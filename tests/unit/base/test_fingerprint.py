"""What changes a base's fingerprint and what does not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loramux_base.fingerprint as module
from loramux_base.checkpoint import ModelLoadError
from loramux_base.fingerprint import CACHE_NAME, Fingerprint, base_fingerprint


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}", "eos_token": "a"}))
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, directory / "model.safetensors")
    return directory


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def reshard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor.clone()}, directory / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def one_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["b"][2] += 1e-6
    save_file(tensors, directory / "model.safetensors")


def renamed_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({"a": tensors["a"], "c": tensors["b"]}, directory / "model.safetensors")


def reshaped_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({"a": tensors["a"].view(3, 2), "b": tensors["b"]}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (one_weight, "weights"),
        (renamed_weight, "weights"),
        (reshaped_weight, "weights"),
        (lambda d: edit(d / "config.json", hidden_size=9), "config"),
        (lambda d: edit(d / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 2e4}), "config"),
        (lambda d: edit(d / "tokenizer.json", model={"vocab": {"a": 1}}), "tokenizer"),
        (lambda d: edit(d / "tokenizer_config.json", eos_token="b"), "tokenizer"),
        (lambda d: edit(d / "tokenizer_config.json", chat_template="{{ y }}"), "chat_template"),
        (lambda d: (d / "chat_template.jinja").write_text("{{ z }}"), "chat_template"),
        (
            lambda d: edit(
                d / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
            ),
            "quantization",
        ),
    ],
)
def test_a_change_names_its_part(base: Path, change: Callable[[Path], Any], part: str) -> None:
    before = base_fingerprint(base)
    change(base)
    after = base_fingerprint(base)
    assert after.differences(before.parts) == (part,)
    assert (after.hex == before.hex) == (part == "chat_template")


@pytest.mark.parametrize(
    "change",
    [
        reshard,
        lambda d: edit(d / "config.json", transformers_version="9", use_cache=False, architectures=["X"]),
        lambda d: edit(d / "config.json", rope_parameters=None, rope_theta=1e4),
        lambda d: edit(d / "config.json", rope_parameters=None, rope_theta=1e4, rope_scaling={"type": "default"}),
        lambda d: (d / "tokenizer.json").write_text(
            json.dumps(json.loads((d / "tokenizer.json").read_text()), indent=4)
        ),
        lambda d: edit(d / "tokenizer_config.json", model_max_length=5),
        lambda d: (d / "README.md").write_text("hello"),
        lambda d: os.utime(d / "model.safetensors", (1, 1)),
    ],
)
def test_what_does_not_matter(base: Path, change: Callable[[Path], Any]) -> None:
    before = base_fingerprint(base)
    change(base)
    assert base_fingerprint(base) == before


def test_survives_a_move(base: Path, tmp_path: Path) -> None:
    before = base_fingerprint(base)
    shutil.copytree(base, tmp_path / "copy")
    assert base_fingerprint(tmp_path / "copy") == before


def test_quantized_at_load_is_another_base(base: Path) -> None:
    plain, at_load = base_fingerprint(base), base_fingerprint(base, quantized_at_load="nf4")
    assert at_load.differences(plain.parts) == ("quantization",) and at_load.hex != plain.hex


def test_repeated_start_reads_no_weights(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = base_fingerprint(base)
    assert (base / CACHE_NAME).exists()

    def fail(info: object) -> str:
        raise AssertionError(f"hashed {info} again")

    monkeypatch.setattr(module, "_hash_tensor", fail)
    assert base_fingerprint(base) == before
    os.utime(base / "model.safetensors", (1, 1))
    with pytest.raises(AssertionError, match="hashed"):
        base_fingerprint(base)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"version": 2, "files": {"model.safetensors": 3}}',
        '{"version": 2, "files": 3}',
        '{"version": 0, "files": {}}',
    ],
)
def test_damaged_cache_is_ignored(base: Path, content: str) -> None:
    before = base_fingerprint(base)
    (base / CACHE_NAME).write_text(content)
    assert base_fingerprint(base) == before


def test_directory_that_cannot_be_written(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = base_fingerprint(base)
    (base / CACHE_NAME).unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", refuse)
    assert base_fingerprint(base) == before
    assert not (base / CACHE_NAME).exists()


def test_differences_names_missing_parts() -> None:
    ours = Fingerprint(parts={"config": "1", "weights": "2"})
    assert ours.differences({"config": "1"}) == ("weights",)
    assert ours.differences({"config": "1", "weights": "2", "more": "3"}) == ()


def test_neither_torch_nor_transformers_is_imported(base: Path) -> None:
    code = (
        "import sys; from loramux_base.fingerprint import base_fingerprint; print(base_fingerprint(sys.argv[1]).hex); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.stdout.strip() == base_fingerprint(base).hex


def test_a_template_that_is_no_text_is_refused(base: Path) -> None:
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja: unreadable"):
        base_fingerprint(base)
