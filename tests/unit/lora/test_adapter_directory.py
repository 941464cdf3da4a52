import os
import shutil
import threading
from pathlib import Path

import pytest

from loramux_server.lora import adapter_directory
from loramux_server.lora.adapter_directory import AdapterDirectory, EntryChanged, Scan
from tests.support.lifecycle_doubles import CONFIG, tensors_record

TENSORS = "adapter_model.safetensors"


def write(directory: Path, content: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_bytes(CONFIG)
    (directory / TENSORS).write_text(content)
    return directory


def reasons(scan: Scan) -> dict[str, str]:
    return {item.path: item.reason for item in scan.left}


def test_a_scan_finds_adapters_by_tenant_and_says_why_it_leaves_the_rest(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("acme/bot", "acme/bot.partial", "acme/.hidden", "acme/UPPER", "zeta/bot", ".git/bot", "t.partial/x"):
        write(root / name, name)
    outside = write(tmp_path / "outside", "secret")
    (root / "acme" / "link").symlink_to(outside, target_is_directory=True)
    (root / "linked").symlink_to(root / "acme", target_is_directory=True)
    (root / "acme" / "readme").write_text("x")
    (root / "acme" / "broken\udcff").mkdir()
    inner = write(root / "acme" / "inner", "x")
    (inner / TENSORS).unlink()
    (inner / TENSORS).symlink_to(outside / TENSORS)
    pipe = write(root / "acme" / "pipe", "x")
    (pipe / TENSORS).unlink()
    os.mkfifo(pipe / TENSORS)
    scan = AdapterDirectory(root).scan()
    assert [entry.path for entry in scan.entries] == ["acme/bot", "zeta/bot"]
    left = reasons(scan)
    expected = {
        ".git": "dot",
        "t.partial": ".partial",
        "linked": "symbolic link",
        "acme/.hidden": "dot",
        "acme/bot.partial": "rename it",
        "acme/UPPER": "no valid name",
        "acme/broken\udcff": "no valid name",
        "acme/readme": "no directory",
        "acme/link": "symbolic link",
        "acme/inner": f"'{TENSORS}', a symbolic link",
        "acme/pipe": "no regular file",
    }
    assert left.keys() == expected.keys()
    assert all(words in left[path] for path, words in expected.items()), left


def test_a_directory_that_is_not_there_is_an_error_and_one_that_goes_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        AdapterDirectory(tmp_path / "nowhere").scan()
    write(tmp_path / "root" / "acme" / "bot", "1")
    write(tmp_path / "root" / "acme" / "bye", "2")
    look = adapter_directory._look

    def racing(tenant: str, adapter: str, parent: int) -> object:
        if adapter == "bot":
            shutil.rmtree(tmp_path / "root" / "acme" / "bot")
        return look(tenant, adapter, parent)

    monkeypatch.setattr(adapter_directory, "_look", racing)
    scan = AdapterDirectory(tmp_path / "root").scan()
    assert [entry.path for entry in scan.entries] == ["acme/bye"] and not scan.left


def test_what_cannot_be_read_is_said_and_the_rest_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("acme/bad", "acme/good", "locked/bot"):
        write(tmp_path / name, name)
    opened = os.open

    def refuse(path: object, *arguments: object, **options: object) -> int:
        if path in ("bad", "locked"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_directory.os, "open", refuse)
    scan = AdapterDirectory(tmp_path).scan()
    assert [entry.path for entry in scan.entries] == ["acme/good"]
    assert reasons(scan) == dict.fromkeys(("acme/bad", "locked"), "it cannot be read (Permission denied)")


def test_entries_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_directory, "_MOST_ENTRIES", 2)
    monkeypatch.setattr(adapter_directory, "_MOST_FILES", 2)
    for name in ("a/x", "a/y", "a/z", "b/x", "c/x"):
        write(tmp_path / name, name)
    (tmp_path / "b" / "x" / "extra").write_text("x")
    scan = AdapterDirectory(tmp_path).scan()
    tenants = {entry.tenant for entry in scan.entries} | {item.tenant for item in scan.left if item.tenant}
    assert len(tenants) <= 2 and len(scan.entries) <= 4
    assert "more than 2 entries" in reasons(scan)[""]


def test_an_entry_is_equal_until_something_changes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    bot = write(root / "acme" / "bot", "1")
    directory = AdapterDirectory(root)

    def entry() -> object:
        (found,) = directory.scan().entries
        return found

    seen = [entry()]
    assert entry() == seen[0]
    (bot / TENSORS).write_text("2")  # as long as before
    os.utime(bot / TENSORS, ns=(1, 1))
    seen.append(entry())
    write(tmp_path / "new", "2")
    bot.rename(tmp_path / "old")
    (tmp_path / "new").rename(bot)
    seen.append(entry())
    (bot / "loramux_manifest.json").write_text("{}")
    seen.append(entry())
    assert len(set(seen)) == 4


def test_reads_are_of_the_files_that_were_seen(tmp_path: Path) -> None:
    root = tmp_path / "root"
    bot = write(root / "acme" / "bot", "0123456789")
    directory = AdapterDirectory(root)
    (entry,) = directory.scan().entries
    going = threading.Event()
    assert directory.read(entry, TENSORS, 3, 4) == b"3456" and directory.read(entry, TENSORS, 8, 100) == b"89"
    assert directory.record(entry, TENSORS, going) == tensors_record(b"0123456789")
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(EntryChanged):
        directory.record(entry, TENSORS, stopping)
    write(tmp_path / "new", "0123456789")
    bot.rename(tmp_path / "old")
    with pytest.raises(EntryChanged):
        directory.read(entry, TENSORS, 0, 1)
    (tmp_path / "new").rename(bot)
    with pytest.raises(EntryChanged):
        directory.read(entry, TENSORS, 0, 1)
    shutil.rmtree(bot)
    bot.symlink_to(tmp_path / "old", target_is_directory=True)
    with pytest.raises(OSError, match="bot"):
        directory.read(entry, TENSORS, 0, 1)
