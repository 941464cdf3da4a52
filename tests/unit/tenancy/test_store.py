import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_server.errors import Reason, Unavailable
from loramux_server.tenancy.store import DirectoryLock, LocalStore, StoreInUse, StoreNotWritable
from tests.support.lifecycle_doubles import digest_of

D = digest_of("x")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    made = LocalStore(tmp_path / "store")
    yield made
    made.close()


def filled(store: LocalStore, content: str = "data") -> Path:
    directory = store.new_upload()
    (directory / "adapter_model.safetensors").write_text(content)
    return directory


def content(store: LocalStore) -> str:
    return (store.path("default", D) / "adapter_model.safetensors").read_text()


def test_an_object_moves_in_whole_and_read_only(store: LocalStore) -> None:
    directory = filled(store)
    store.place("default", D, directory, in_use=False)
    assert store.contains("default", D) and content(store) == "data"
    assert not directory.exists()
    assert (store.path("default", D) / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o400


def test_what_was_never_committed_gives_way(store: LocalStore) -> None:
    store.place("default", D, filled(store, "left by a crash"), in_use=False)
    store.place("default", D, filled(store, "good"), in_use=False)
    assert content(store) == "good"


def test_what_is_in_use_stays(store: LocalStore) -> None:
    store.place("default", D, filled(store, "first"), in_use=False)
    second = filled(store, "second")
    store.place("default", D, second, in_use=True)
    assert content(store) == "first" and second.exists()
    store.discard_upload(second)


def test_what_was_not_committed_can_be_taken_back(store: LocalStore) -> None:
    directory = filled(store)
    store.take_back("default", D, directory)
    store.place("default", D, directory, in_use=False)
    store.take_back("default", D, directory)
    assert not store.contains("default", D)
    assert (directory / "adapter_model.safetensors").read_text() == "data"


def test_removal_is_complete_and_repeatable(store: LocalStore, tmp_path: Path) -> None:
    store.place("default", D, filled(store), in_use=False)
    store.remove("default", D)
    store.remove("default", D)
    assert not store.contains("default", D)
    assert list((tmp_path / "store" / ".trash").iterdir()) == []


def test_a_start_sweeps_uploads_and_trash_and_keeps_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.place("default", D, filled(store), in_use=False)
    filled(store, "abandoned")
    (tmp_path / ".trash" / "half").mkdir()
    (tmp_path / ".trash" / "half" / "file").write_text("x")
    store.close()
    store = LocalStore(tmp_path)
    assert list((tmp_path / ".uploads").iterdir()) == list((tmp_path / ".trash").iterdir()) == []
    assert content(store) == "data"
    store.close()


def test_a_second_store_on_the_directory_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with pytest.raises(StoreInUse, match="another loramux server"):
        LocalStore(tmp_path)
    probe = (
        "import sys; from pathlib import Path; from loramux_server.tenancy.store import *\n"
        "try: LocalStore(Path(sys.argv[1]))\nexcept StoreInUse: print('in use')"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == "in use"
    store.close()
    store.close()
    LocalStore(tmp_path).close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreNotWritable, match="cannot be written"):
            LocalStore(path)


def test_a_store_whose_areas_cannot_be_made_is_refused_and_unlocked(tmp_path: Path) -> None:
    (tmp_path / ".uploads").write_text("in the way")
    with pytest.raises(StoreNotWritable):
        LocalStore(tmp_path)
    DirectoryLock(tmp_path).close()


def test_a_failing_file_system_is_unavailable_without_a_path(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = filled(store)

    def broken(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(Unavailable) as caught:
        store.place("default", D, directory, in_use=False)
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert str(tmp_path) not in caught.value.message
    assert not store.contains("default", D)


def test_no_tenant_can_collide_with_the_store_itself(store: LocalStore, tmp_path: Path) -> None:
    for tenant in ("objects", "registry.sqlite"):
        assert store.path(tenant, D).parent.parent == tmp_path / "store" / "objects"


def test_only_checked_names_become_paths(store: LocalStore) -> None:
    for tenant, digest in (("..", D), ("default", "../x"), ("a/b", D), ("default", D[:16])):
        with pytest.raises(AssertionError):
            store.path(tenant, digest)
