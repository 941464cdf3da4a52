"""The serving blob: an adapter's rows as the slab takes them, kept in a file beside the PEFT files they were read from.

```
serving.slab      magic (8) | body length (4) | CRC-32 of the body (4) | body (JSON) | zeros up to 4096
                  payload: `RowsLayout.nbytes` bytes, the blocks of `adapter_rows.py` one after the other
```

Reading it is one pass of large reads with no cast and no transposition. It is a cache: whatever is wrong with it, the
PEFT files are read instead and the file is written again. Two things guard it:

- The *binding* ties it to what it was made from: the directory's name (in the store that is the digest of the version),
  the bytes of `adapter_config.json`, the header, size and time of change of the tensors, shapes of the base and dtype
  of serving. Another adapter, a changed one, another base and a moved file are told apart by it.
- CRC-32s find a file that is torn or has rotted. They are no defence against somebody who may write to the store, who
  could as well write the adapter itself. A cryptographic hash would be none either, and BLAKE2b takes 120 ms for the
  80 MB of a rank-16 adapter of a 7B model on a core that does CRC-32 in 31 ms.
"""

import ctypes
import errno
import hashlib
import os
import stat
import zlib
from pathlib import Path
from types import TracebackType

import msgspec
import torch
from torch import Tensor

from loramux_base.adapter import CONFIG_NAME, LINEAR_GROUPS, MAX_CONFIG_BYTES, TENSORS_NAME, BaseShapes
from loramux_base.safetensors_header import MAX_HEADER_BYTES
from loramux_server.model.adapter_read import read_exactly
from loramux_server.model.adapter_rows import AdapterRows, BadRows, RowsLayout

BLOB_NAME = "serving.slab"
PARTIAL_NAME = BLOB_NAME + ".partial"
"""Name while it is being written; what a killed process left under it is removed by the next writer."""
PAYLOAD_START = 4096

_MAGIC = b"LMXSLAB\x00"
_FORMAT = 1
# A piece that is still in the processor's cache when its checksum is taken.
_CHUNK = 4 << 20


class BadBlob(ValueError):
    """The file is no blob of this adapter, base and dtype, or is damaged; the text says what is wrong."""


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    binding: str
    dtype: str
    layers: int
    rows: int
    groups: list[str]
    layer_bytes: int
    payload_crc32: int


def blob_binding(directory: Path, base: BaseShapes, dtype: torch.dtype) -> str:
    """Digest over everything that a blob depends on.

    To be taken before the adapter is read: one that changes meanwhile then does not fit its blob.

    Args:
        directory: The PEFT directory.
        base: Shapes of the base's linear layers.
        dtype: Of the rows.

    Returns:
        32 hex digits.

    Raises:
        OSError: The adapter's files cannot be read.
    """
    config = _read_head(directory / CONFIG_NAME, MAX_CONFIG_BYTES)[0]
    tensors, state = _read_head(directory / TENSORS_NAME, 8 + MAX_HEADER_BYTES)
    header = tensors[: 8 + int.from_bytes(tensors[:8], "little")]
    shapes = sorted((name, *shape) for name, shape in base.modules.items())
    facts = (directory.name, base.num_layers, shapes, _name(dtype), state.st_size, state.st_mtime_ns)
    digest = hashlib.blake2b(digest_size=16)
    for part in (msgspec.json.encode(facts), config, header):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


class ServingBlob:
    """A blob that is open for reading; its header has been checked, its payload has not.

    Args:
        directory: Of the version.
        binding: As `blob_binding` gives it now.
        base: Shapes of the base's linear layers.
        dtype: Of the rows.
        max_rank: Largest rank taken.

    Raises:
        FileNotFoundError: There is none.
        BadBlob: It is of something else, or damaged.
        OSError: It cannot be read.
    """

    def __init__(self, directory: Path, *, binding: str, base: BaseShapes, dtype: torch.dtype, max_rank: int) -> None:
        # Opening must neither follow a link out of the directory nor wait for the other end of a pipe.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(directory / BLOB_NAME, flags)
        try:
            body = _read_body(self._descriptor)
            if body.binding != binding:
                raise BadBlob("it was made from another state of the adapter, or for another base or dtype")
            self.layout = _layout_of(body, base, dtype, max_rank)
            size = os.fstat(self._descriptor).st_size
            if size != PAYLOAD_START + self.layout.nbytes:
                raise BadBlob(f"it has {size} bytes instead of {PAYLOAD_START + self.layout.nbytes}")
            self._crc32 = body.payload_crc32
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ServingBlob":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, memory: Tensor) -> AdapterRows:
        """Read the payload and check it.

        Args:
            memory: `[layout.nbytes]` uint8 in host memory; every byte is written.

        Raises:
            BadBlob: It is damaged.
            OSError: It cannot be read.
        """
        rows = AdapterRows(layout=self.layout, memory=memory[: self.layout.nbytes])
        target = _bytes_of(rows.memory)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, PAYLOAD_START, len(target), os.POSIX_FADV_WILLNEED)
        checksum = 0
        for begin in range(0, len(target), _CHUNK):
            piece = target[begin : begin + _CHUNK]
            read_exactly(self._descriptor, piece, PAYLOAD_START + begin)
            checksum = zlib.crc32(piece, checksum)
        if checksum != self._crc32:
            raise BadBlob("its payload is damaged")
        try:
            rows.ranks()
        except BadRows as error:
            raise BadBlob(str(error)) from error
        return rows


def write_blob(directory: Path, rows: AdapterRows, *, binding: str) -> None:
    """Write the blob of a version; readers see the old file or the whole new one.

    Args:
        directory: Of the version.
        rows: As `read_rows` gave them; they must not change meanwhile.
        binding: As `blob_binding` gave it before that.

    Raises:
        OSError: The directory cannot be written, or is gone; nothing is left behind.
    """
    source, layout = _bytes_of(rows.memory), rows.layout
    checksum = 0
    for begin in range(0, len(source), _CHUNK):
        checksum = zlib.crc32(source[begin : begin + _CHUNK], checksum)
    body = _Body(
        format=_FORMAT,
        binding=binding,
        dtype=_name(layout.dtype),
        layers=layout.num_layers,
        rows=layout.rows,
        groups=list(layout.groups),
        layer_bytes=layout.layer_bytes,
        payload_crc32=checksum,
    )
    raw = msgspec.json.encode(body)
    head = _MAGIC + len(raw).to_bytes(4, "little") + zlib.crc32(raw).to_bytes(4, "little") + raw
    assert len(head) <= PAYLOAD_START, "the header outgrew its place"
    partial = directory / PARTIAL_NAME
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write_exactly(descriptor, memoryview(head.ljust(PAYLOAD_START, b"\x00")))
            for begin in range(0, len(source), _CHUNK):
                _write_exactly(descriptor, source[begin : begin + _CHUNK])
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o400)
        finally:
            os.close(descriptor)
        partial.replace(directory / BLOB_NAME)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _read_body(descriptor: int) -> _Body:
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_size < PAYLOAD_START:
        raise BadBlob("it is no regular file or has no header")
    head = bytearray(PAYLOAD_START)
    read_exactly(descriptor, memoryview(head), 0)
    length = int.from_bytes(head[8:12], "little")
    raw = bytes(head[16 : 16 + length])
    if not head.startswith(_MAGIC) or len(raw) != length or zlib.crc32(raw) != int.from_bytes(head[12:16], "little"):
        raise BadBlob("its header is damaged")
    try:
        body = msgspec.json.decode(raw, type=_Body)
    except msgspec.MsgspecError as error:
        raise BadBlob("its header is of another format") from error
    if body.format != _FORMAT:
        raise BadBlob(f"its format is {body.format}, this server writes {_FORMAT}")
    return body


def _layout_of(body: _Body, base: BaseShapes, dtype: torch.dtype, max_rank: int) -> RowsLayout:
    known = tuple(name for name in LINEAR_GROUPS if name in body.groups)
    if not 0 < body.rows <= max_rank or list(known) != body.groups or not known:
        raise BadBlob(f"it has {body.rows} rows of the groups {body.groups}")
    layout = RowsLayout(base, dtype=dtype, rows=body.rows, groups=known)
    if (body.dtype, body.layers, body.layer_bytes) != (_name(dtype), layout.num_layers, layout.layer_bytes):
        raise BadBlob("its layers are laid out otherwise")
    return layout


def _read_head(path: Path, size: int) -> tuple[bytes, os.stat_result]:
    with path.open("rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(size) or b"", state


def _write_exactly(descriptor: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += os.write(descriptor, buffer[done:])


def _bytes_of(memory: Tensor) -> memoryview:
    """The bytes of a uint8 tensor in host memory, writable; valid while the tensor lives."""
    assert memory.device.type == "cpu" and memory.dtype == torch.uint8 and memory.is_contiguous()
    return memoryview((ctypes.c_ubyte * memory.numel()).from_address(memory.data_ptr())).cast("B")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
