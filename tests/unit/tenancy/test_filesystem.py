from pathlib import Path

import pytest

from loramux_server.tenancy import database
from loramux_server.tenancy.database import Database, RegistryError
from loramux_server.tenancy.filesystem import network_type

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/share rw - nfs4 host:/export rw
31 30 8:2 / /mnt/share/local rw - xfs /dev/sdb rw
32 22 0:41 / /mnt/two\\040words rw master:2 - fuse.sshfs host: rw
33 22 0:42 / /over rw - nfs host:/x rw
34 22 8:3 / /over rw - ext4 /dev/sdc rw
a line of something else
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/var/lib/loramux", None),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/registry.sqlite", "nfs4"),
        ("/mnt/shared", None),
        ("/mnt/share/local/registry.sqlite", None),
        ("/mnt/two words/x", "fuse.sshfs"),
        ("/over/x", None),
    ],
)
def test_the_innermost_mount_decides(mounts: Path, path: str, expected: str | None) -> None:
    assert network_type(Path(path), mounts) == expected


def test_unreadable_mounts_decide_nothing(tmp_path: Path) -> None:
    assert network_type(Path("/mnt/share"), tmp_path / "missing") is None


def test_a_registry_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "network_type", lambda path: "nfs4")
    with pytest.raises(RegistryError, match="nfs4"):
        Database(tmp_path / "r.sqlite")
    assert not (tmp_path / "r.sqlite").exists()
