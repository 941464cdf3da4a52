"""A directory that changes while it is read: the server keeps a file of its own beside a stored adapter."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_base.adapter import read_layout
from tests.support.adapters import tensors_of, tiny_base, write_adapter


def test_a_file_that_goes_while_the_directory_is_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base()
    adapter = write_adapter(tmp_path / "a", tensors_of(base))
    (adapter / "serving.slab.partial").touch()
    scandir = os.scandir

    @contextlib.contextmanager
    def late(path: Path) -> "Iterator[Iterator[os.DirEntry[str]]]":
        with scandir(path) as entries:
            listed = list(entries)
        (adapter / "serving.slab.partial").rename(adapter / "serving.slab")
        yield iter(listed)

    monkeypatch.setattr("os.scandir", late)
    assert read_layout(adapter, base, max_rank=16).max_rank == 4
