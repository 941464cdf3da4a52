"""The serving blob: what was read comes back bit for bit, and whatever does not fit is told apart."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loramux_base.adapter import CONFIG_NAME, TENSORS_NAME, BaseShapes, read_layout
from loramux_server.model import serving_blob
from loramux_server.model.adapter_read import read_rows
from loramux_server.model.adapter_rows import AdapterRows, RowsLayout
from loramux_server.model.serving_blob import (
    BLOB_NAME,
    PARTIAL_NAME,
    PAYLOAD_START,
    BadBlob,
    ServingBlob,
    blob_binding,
    write_blob,
)
from tests.support.adapters import tensors_of, tiny_base, write_adapter

BASE = tiny_base()
BF16 = torch.bfloat16


def read(directory: Path, *, base: BaseShapes = BASE, dtype: torch.dtype = BF16) -> AdapterRows:
    adapter = read_layout(directory, base, max_rank=32)
    layout = RowsLayout.of(base, adapter, dtype=dtype)
    rows = AdapterRows(layout=layout, memory=torch.empty(layout.nbytes, dtype=torch.uint8))
    read_rows(directory, adapter, layout, rows.memory)
    return rows


def open_blob(
    directory: Path, *, base: BaseShapes = BASE, dtype: torch.dtype = BF16, max_rank: int = 32
) -> ServingBlob:
    binding = blob_binding(directory, base, dtype)
    return ServingBlob(directory, binding=binding, base=base, dtype=dtype, max_rank=max_rank)


def load(directory: Path, **options: object) -> AdapterRows:
    with open_blob(directory, **options) as blob:  # type: ignore[arg-type]
        return blob.read(torch.full((blob.layout.nbytes,), 0xA5, dtype=torch.uint8))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of some modules of some layers, with its blob."""
    tensors = tensors_of(BASE, rank=17, layers=[0, 2], modules=["q_proj", "v_proj", "down_proj"], value=0.3)
    directory = write_adapter(tmp_path / "adapter", tensors, r=17)
    write_blob(directory, read(directory), binding=blob_binding(directory, BASE, BF16))
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_rows_come_back_bit_for_bit(
    adapter: Path, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_blob, "_CHUNK", chunk)
    rows = read(adapter, dtype=dtype)
    write_blob(adapter, rows, binding=blob_binding(adapter, BASE, dtype))
    again = load(adapter, dtype=dtype)
    assert torch.equal(again.memory, rows.memory)
    assert (again.layout.rows, again.layout.groups, again.layout.dtype) == (17, ("qkv", "down"), dtype)
    assert again.ranks() == rows.ranks() and again.scales() == rows.scales()
    assert again.ranks() == {(layer, name): 17 for layer in (0, 2) for name in ("q_proj", "v_proj", "down_proj")}
    assert (adapter / BLOB_NAME).stat().st_size == PAYLOAD_START + rows.layout.nbytes


def flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.chmod(0o600)
    path.write_bytes(raw)


def truncate(path: Path, size: int) -> None:
    path.chmod(0o600)
    os.truncate(path, size)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: truncate(path, 0),
    "no payload": lambda path: truncate(path, PAYLOAD_START),
    "torn": lambda path: truncate(path, path.stat().st_size - 1),
    "longer": lambda path: truncate(path, path.stat().st_size + 1),
    "magic": lambda path: flip(path, 0),
    "length": lambda path: flip(path, 8),
    "huge length": lambda path: flip(path, 11),
    "header": lambda path: flip(path, 40),
    "first byte": lambda path: flip(path, PAYLOAD_START),
    "last byte": lambda path: flip(path, path.stat().st_size - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(adapter: Path, damage: str) -> None:
    load(adapter)
    DAMAGES[damage](adapter / BLOB_NAME)
    with pytest.raises(BadBlob):
        load(adapter)


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_another_state_of_the_adapter_is_told_apart(adapter: Path, name: str) -> None:
    path = adapter / name
    before = path.stat()
    if name == CONFIG_NAME:
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 9}))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(BadBlob, match="another state"):
        load(adapter)


def test_a_header_of_the_same_length_and_time_is_told_apart(adapter: Path) -> None:
    path = adapter / TENSORS_NAME
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"layers.2.", b"layers.1."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(BadBlob, match="another state"):
        load(adapter)


def test_a_blob_does_not_go_with_another_directory(adapter: Path, tmp_path: Path) -> None:
    moved = tmp_path / "other"
    shutil.copytree(adapter, moved)
    assert (moved / TENSORS_NAME).stat().st_mtime_ns == (adapter / TENSORS_NAME).stat().st_mtime_ns
    with pytest.raises(BadBlob, match="another state"):
        load(moved)


def test_another_base_dtype_or_rank_limit_is_told_apart(adapter: Path) -> None:
    for changes in ({"num_hidden_layers": 4}, {"intermediate_size": 64}):
        with pytest.raises(BadBlob, match="another state"):
            load(adapter, base=tiny_base(**changes))
    with pytest.raises(BadBlob, match="another state"):
        load(adapter, dtype=torch.float16)
    with pytest.raises(BadBlob, match="17 rows"):
        load(adapter, max_rank=16)


def test_ranks_that_no_rows_hold_are_seen(adapter: Path) -> None:
    rows = read(adapter)
    rows.layout.views(rows.memory)["qkv"].ranks[0, 0] = 18
    write_blob(adapter, rows, binding=blob_binding(adapter, BASE, BF16))
    with pytest.raises(BadBlob, match="rank 18"):
        load(adapter)


def test_no_blob_is_no_damage(adapter: Path) -> None:
    (adapter / BLOB_NAME).unlink()
    with pytest.raises(FileNotFoundError):
        load(adapter)


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_regular_files_are_read(adapter: Path, tmp_path: Path, kind: str) -> None:
    blob = adapter / BLOB_NAME
    blob.rename(tmp_path / "elsewhere")
    if kind == "link":
        blob.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(blob)
    else:
        blob.mkdir()
    with pytest.raises((BadBlob, OSError)):
        load(adapter)


def test_what_a_killed_writer_left_is_replaced(adapter: Path) -> None:
    partial = adapter / PARTIAL_NAME
    partial.write_bytes(b"half")
    partial.chmod(0o400)
    rows = read(adapter)
    write_blob(adapter, rows, binding=blob_binding(adapter, BASE, BF16))
    assert not partial.exists()
    assert torch.equal(load(adapter).memory, rows.memory)


def test_a_write_that_fails_leaves_the_old_blob_alone(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (adapter / BLOB_NAME).read_bytes()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_blob(adapter, read(adapter), binding="x")
    assert sorted(path.name for path in adapter.iterdir()) == sorted([CONFIG_NAME, TENSORS_NAME, BLOB_NAME])
    assert (adapter / BLOB_NAME).read_bytes() == before


def test_an_adapter_with_a_blob_is_still_an_adapter(adapter: Path) -> None:
    (adapter / PARTIAL_NAME).write_bytes(b"half")
    assert read_layout(adapter, BASE, max_rank=32).max_rank == 17
