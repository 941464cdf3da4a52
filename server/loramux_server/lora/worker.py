"""The validation worker: `python -m loramux_server.lora.worker --fd N`, a process that reads what tenants upload.

It runs at low priority under limits of memory and processor time, writes no file and ends with its parent (EOF). An
adapter that makes it fail costs this process, nothing else. No torch: a scan for NaN needs the bits alone.
"""

import argparse
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loramux_base.adapter import (
    MANIFEST_NAME,
    TENSORS_NAME,
    AdapterFormatError,
    read_layout,
    read_manifest,
    version_digest,
)
from loramux_base.adapter_digests import check_digests
from loramux_base.safetensors_header import read_header
from loramux_base.shapes import BaseShapes, UnsupportedBase, base_shapes
from loramux_server.lora import worker_messages as wire

_CHUNK_BYTES = 4 << 20
_NICE = 10
# Numbers whose exponent bits are all ones are NaN or infinite.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F32": (np.dtype("<u4"), 0x7F800000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}


def scan_finite(path: Path) -> None:
    """Read every number of a tensors file, in chunks.

    Raises:
        AdapterFormatError: ADAPTER_NUMERICS with the tensor's name: it holds NaN or infinity.
        OSError: The file cannot be read.
    """
    tensors, data_start = read_header(path)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(data_start)
        for tensor in tensors:
            dtype, exponent = _EXPONENTS[tensor.dtype]
            left = tensor.end - tensor.start
            while left:
                chunk = buffer[: min(left, _CHUNK_BYTES)]
                _read_exactly(file, chunk)
                left -= len(chunk)
                bits = np.frombuffer(chunk, dtype=dtype)
                if bool(np.any((bits & exponent) == exponent)):
                    raise AdapterFormatError(
                        "ADAPTER_NUMERICS",
                        tensor.name,
                        f"tensor {ascii(tensor.name)} holds NaN or infinity; publish another checkpoint or train again",
                    )


def validate(request: wire.ValidateAdapter) -> wire.Answer:
    """Check one adapter."""
    directory = Path(request.directory)
    try:
        layout = read_layout(directory, _served_shapes(Path(request.base_config)), max_rank=request.max_rank)
        base_fingerprint, verified = _check_manifest(request, directory)
        scan_finite(directory / TENSORS_NAME)
        return wire.Validated(
            id=request.id,
            digest=version_digest(directory),
            rank=layout.max_rank,
            rank_units=layout.rank_units,
            modules=tuple(sorted({part.module for part in layout.modules})),
            tensor_bytes=layout.tensor_bytes,
            base_fingerprint=base_fingerprint,
            base_verified=verified,
        )
    except AdapterFormatError as error:
        return wire.Refused(id=request.id, reason=error.reason, field=error.field[:256], message=error.message)
    except UnsupportedBase as error:
        return wire.Refused(
            id=request.id, reason="ADAPTER_INCOMPATIBLE", field="base", message=f"this base takes no adapters: {error}"
        )
    except OSError as error:
        return wire.Unreadable(id=request.id, message=error.strerror or "read error")


def _served_shapes(config: Path) -> BaseShapes:
    value = json.loads(config.read_bytes())
    if not isinstance(value, dict):
        raise UnsupportedBase("config.json must hold an object")
    return base_shapes(value)


def _check_manifest(request: wire.ValidateAdapter, directory: Path) -> tuple[str, bool]:
    manifest = read_manifest(directory)
    if manifest is None:
        if not request.allow_unverified:
            raise AdapterFormatError(
                "ADAPTER_INCOMPATIBLE",
                MANIFEST_NAME,
                f"the adapter has no {MANIFEST_NAME}, so its base is unknown; publish it with the trainer, or start "
                "the server with --allow-unverified-adapters",
            )
        return "", False
    manifest.check_base(request.base_fingerprint, request.base_parts)
    check_digests(directory, manifest)
    return manifest.base_fingerprint, True


def _read_exactly(file: Any, chunk: memoryview) -> None:
    done = 0
    while done < len(chunk):
        count = file.readinto(chunk[done:])
        if not count:
            raise OSError(0, "the file became shorter while it was read")
        done += count


def _receive(connection: socket.socket, count: int) -> bytes | None:
    """Exactly `count` bytes; None at the end of the stream."""
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def _limit(memory_bytes: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    for kind, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))


def _limit_processor(seconds: int) -> None:
    """End this process (SIGXCPU) after so many further seconds of processor time."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def serve(connection: socket.socket, cpu_seconds: int) -> None:
    """Answer requests until the parent closes the socket."""
    connection.sendall(wire.encode(wire.Started()))
    while (prefix := _receive(connection, wire.LENGTH.size)) is not None:
        body = _receive(connection, wire.body_length(prefix))
        if body is None:
            return
        _limit_processor(cpu_seconds)
        connection.sendall(wire.encode(validate(wire.REQUESTS.decode(body))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker; returns the exit status."""
    parser = argparse.ArgumentParser(prog="loramux_server.lora.worker", description="Validates uploaded adapters.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front end")
    parser.add_argument("--memory-bytes", type=int, required=True, help="address space it may use")
    parser.add_argument("--cpu-seconds", type=int, required=True, help="processor time a request may use")
    options = parser.parse_args(arguments)
    _limit(options.memory_bytes)
    with socket.socket(fileno=options.fd) as connection:
        try:
            serve(connection, options.cpu_seconds)
        except (ConnectionError, wire.WorkerFrameError, msgspec.MsgspecError) as error:
            print(f"the front end's socket is of no use any more: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
