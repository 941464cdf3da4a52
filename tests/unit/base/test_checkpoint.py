"""Model directories that cannot be used are refused with the file and the way out."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramux_base.checkpoint import Checkpoint, ModelLoadError, read_header
from loramux_base.tensors import TensorReader


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors"
    )
    return tmp_path


def shard(directory: Path) -> Path:
    """Split the fixture's file in two with an index."""
    (directory / "model.safetensors").unlink()
    save_file({"a": torch.arange(6.0).view(2, 3)}, directory / "one.safetensors")
    save_file({"b": torch.ones(4, dtype=torch.bfloat16)}, directory / "two.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    return index


def test_reads_one_file(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    assert checkpoint.tensors["a"].shape == (2, 3) and checkpoint.tensors["b"].dtype == "BF16"
    assert torch.equal(TensorReader(checkpoint)("a"), torch.arange(6.0).view(2, 3))
    assert "a" in checkpoint and "c" not in checkpoint
    with pytest.raises(ModelLoadError, match="no tensor c"):
        TensorReader(checkpoint)("c")


def test_reads_shards(directory: Path) -> None:
    shard(directory)
    checkpoint = Checkpoint(directory)
    assert {info.file.name for info in checkpoint.tensors.values()} == {"one.safetensors", "two.safetensors"}
    assert torch.equal(TensorReader(checkpoint)("b"), torch.ones(4, dtype=torch.bfloat16))


def refused(directory: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Checkpoint(directory)
    return str(caught.value)


def test_no_directory(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "none")


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "config.json: missing" in refused(directory)


@pytest.mark.parametrize("text", ["[]", "{", "\ufffd"])
def test_bad_config(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    assert "config.json" in refused(directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refused(directory)


def test_pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    text = refused(directory)
    assert "pytorch_model.bin" in text and "runs code" in text and "safe_serialization" in text


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_truncated(directory: Path, cut: int) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: max(0, len(data) - cut)])
    assert "model.safetensors" in refused(directory)


def test_longer_than_its_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    assert "header promises" in refused(directory)


def header(file: Path, entries: object, data: bytes = b"\0" * 8) -> Path:
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },
        {"a": {"dtype": "F32"}},
        {"a": 3},
        [],
    ],
)
def test_malformed_headers(tmp_path: Path, entries: object) -> None:
    with pytest.raises(ModelLoadError, match="x.safetensors"):
        read_header(header(tmp_path / "x.safetensors", entries))


def test_header_length_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ModelLoadError, match="not a whole safetensors file"):
        read_header(file)


def test_missing_shard(directory: Path) -> None:
    shard(directory)
    (directory / "two.safetensors").unlink()
    assert "two.safetensors: missing" in refused(directory)


def test_index_names_an_absent_tensor(directory: Path) -> None:
    index = shard(directory)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))
    assert "lacks tensor c" in refused(directory)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd"])
def test_index_may_not_leave_the_directory(directory: Path, name: str) -> None:
    index = shard(directory)
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert "outside the directory" in refused(directory)


def test_json_nested_without_end_is_refused(directory: Path) -> None:
    deep = "[" * 100_000
    (directory / "config.json").write_text(deep)
    with pytest.raises(ModelLoadError, match="unreadable"):
        Checkpoint(directory)
    file = directory / "deep.safetensors"
    file.write_bytes(struct.pack("<Q", len(deep)) + deep.encode())
    with pytest.raises(ModelLoadError):
        read_header(file)
