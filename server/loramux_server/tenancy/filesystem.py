"""Which file system a path is on: SQLite's locks and write-ahead log are not safe on network file systems."""

import os
from pathlib import Path

NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "ncpfs"}
    | {
        f"fuse.{name}"
        for name in ("sshfs", "s3fs", "gcsfuse", "glusterfs", "ceph", "rclone", "juicefs", "mountpoint-s3")
    }
)
_MOUNTS = Path("/proc/self/mountinfo")


def network_type(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Type of the network file system that holds `path`; None for a local one, or where mounts cannot be read."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    target = os.path.realpath(path)
    best, found = "", ""
    for line in lines:
        before, separator, after = line.partition(" - ")
        if not separator:
            continue
        point = _unescape(before.split(" ")[4])
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        # Later mounts on one point hide earlier ones.
        if inside and len(point) >= len(best):
            best, found = point, after.split(" ")[0]
    return found if found in NETWORK else None


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks in mountinfo."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
