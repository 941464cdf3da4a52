"""Compiled kernels on disk: whole or not at all, private, and never in the way of a start."""

import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from loramux_server.kernels import kernel_cache
from loramux_server.kernels.kernel_cache import KernelCache, default_folder

NAME = "ab" * 32


def test_what_is_put_is_found_by_the_next_start(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "kernels"
    KernelCache(folder).put(NAME, b"binary")
    assert KernelCache(folder).get(NAME) == b"binary" and KernelCache(folder).get("cd" * 32) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    [file] = folder.iterdir()
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:32],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
)
def test_a_damaged_binary_is_removed_and_said(damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = KernelCache(tmp_path)
    cache.put(NAME, bytes(range(64)))
    path = tmp_path / f"{NAME}.cubin"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.get(NAME) is None and not path.exists()
    assert f"{path} is damaged" in caplog.text
    cache.put(NAME, b"again")
    assert cache.get(NAME) == b"again"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(
    mode: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    KernelCache(tmp_path).put(NAME, b"planted")
    tmp_path.chmod(mode)
    cache = KernelCache(tmp_path)
    assert cache.get(NAME) is None
    cache.put(NAME, b"mine")
    tmp_path.chmod(0o700)
    assert KernelCache(tmp_path).get(NAME) == b"planted"
    assert "somebody else could put code there" in caplog.text and f"{mode:o}" in caplog.text


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    KernelCache(tmp_path).put(NAME, b"theirs")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert KernelCache(tmp_path).get(NAME) is None and "belongs to user" in caplog.text


def test_a_file_in_the_folders_place_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kernels").write_text("")
    cache = KernelCache(tmp_path / "kernels")
    cache.put(NAME, b"binary")
    assert cache.get(NAME) is None and "not kept" in caplog.text


def test_a_folder_that_takes_no_file_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache = KernelCache(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        cache.put(NAME, b"binary")
        cache.put(NAME, b"binary")
    assert caplog.text.count("No space left") == 1 and list(tmp_path.iterdir()) == []


def test_no_folder_keeps_nothing() -> None:
    cache = KernelCache(None)
    cache.put(NAME, b"binary")
    cache.remove(NAME)
    assert cache.get(NAME) is None


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LORAMUX_KERNEL_CACHE", "/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_folder() == Path("/chosen")
    monkeypatch.delenv("LORAMUX_KERNEL_CACHE")
    assert default_folder() == Path("/cache/loramux/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("no home directory")

    monkeypatch.setattr(kernel_cache.Path, "home", homeless)
    assert default_folder() is None and "set LORAMUX_KERNEL_CACHE" in caplog.text


def _write(folder: Path, value: int) -> None:
    cache = KernelCache(folder)
    for _ in range(50):
        cache.put(NAME, bytes([value]) * 10_000)


def test_processes_that_write_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, value)) for value in range(3)]
    for writer in writers:
        writer.start()
    cache, seen = KernelCache(tmp_path), 0
    while any(writer.is_alive() for writer in writers):
        found = cache.get(NAME)
        if found is not None:
            assert found in [bytes([value]) * 10_000 for value in range(3)]
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen and cache.get(NAME) is not None and len(list(tmp_path.iterdir())) == 1
