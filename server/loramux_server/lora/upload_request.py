"""What an upload announces, and the checks that refuse it before any byte is sent."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME, TENSORS_NAME, AdapterConfig, AdapterFormatError
from loramux_base.manifest import AdapterManifest
from loramux_server.errors import FailedPrecondition, InvalidRequest, LoramuxServerError, Reason
from loramux_server.tenancy.names import echo
from loramux_server.tenancy.records import FileRecord

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".zip", ".nemo", ".pkl", ".pickle", ".joblib")
MOST_LABELS = 32
LONGEST_LABEL_KEY = 63
LONGEST_LABEL_VALUE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """Bounds of uploads; sizes in bytes, times in seconds.

    Attributes:
        config_bytes: Largest adapter_config.json.
        manifest_bytes: Largest manifest.
        adapter_bytes: Largest adapter, all files together.
        chunk_bytes: Largest data of one write.
        uploads: Most uploads of a tenant in progress.
        tenant_bytes: Most bytes of a tenant's uploads in progress.
        ended: Outcomes of a tenant that are kept for repeated calls.
        lifetime: From start until an upload is dropped.
        idle: Without a write for so long, an upload makes room for another one of its tenant that finds none.
    """

    config_bytes: int = 64 * 1024
    manifest_bytes: int = 1024 * 1024
    adapter_bytes: int = 4 * 1024**3
    chunk_bytes: int = 1024 * 1024
    uploads: int = 8
    tenant_bytes: int = 8 * 1024**3
    ended: int = 64
    lifetime: float = 3600.0
    idle: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRequest:
    """An upload that passed `check_upload_request`.

    Attributes:
        adapter: {a}.
        config: Bytes of adapter_config.json.
        manifest: Bytes of the manifest, or None.
        tensors: The one file whose bytes are written.
        labels: For a new adapter.
    """

    adapter: str
    config: bytes
    manifest: bytes | None
    tensors: FileRecord
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return len(self.config) + len(self.manifest or b"") + self.tensors.size


def check_upload_request(
    *,
    adapter: str,
    config: bytes,
    manifest: bytes | None,
    files: Sequence[FileRecord],
    labels: Mapping[str, str],
    limits: UploadLimits,
    allow_unverified: bool,
) -> UploadRequest:
    """Check what an upload announces.

    Args:
        adapter: Checked {a}.
        config: Bytes of adapter_config.json.
        manifest: Bytes of the manifest, or None.
        files: As the caller listed them.
        labels: As the caller listed them.
        limits: Bounds.
        allow_unverified: Whether adapters without a manifest are taken.

    Raises:
        InvalidRequest: A field is out of bounds or a file is not wanted.
        FailedPrecondition: ADAPTER_INCOMPATIBLE: the configuration cannot be served, or the manifest is missing.
    """
    if not config:
        raise _invalid("adapter_config", "is empty; send the bytes of adapter_config.json")
    if len(config) > limits.config_bytes:
        raise _invalid("adapter_config", f"has {len(config)} bytes; the limit is {limits.config_bytes}")
    if manifest is not None and len(manifest) > limits.manifest_bytes:
        raise _invalid("manifest", f"has {len(manifest)} bytes; the limit is {limits.manifest_bytes}")
    tensors = _check_files(files)
    total = len(config) + len(manifest or b"") + tensors.size
    if total > limits.adapter_bytes:
        raise _invalid("files[0].size", f"makes {total} bytes in all; the limit is {limits.adapter_bytes}")
    check_labels(labels, "labels")
    _check_format("adapter_config", AdapterConfig.from_json, config)
    if manifest is not None:
        _check_format("manifest", AdapterManifest.from_json, manifest)
    elif not allow_unverified:
        raise FailedPrecondition(
            Reason.ADAPTER_INCOMPATIBLE,
            f"manifest is absent; send {MANIFEST_NAME}, as the trainer writes it, or let the server run with "
            "--allow-unverified-adapters",
            field="manifest",
        )
    return UploadRequest(adapter=adapter, config=config, manifest=manifest, tensors=tensors, labels=dict(labels))


def check_labels(labels: Mapping[str, str], name: str) -> None:
    """Check the owner's labels.

    Raises:
        InvalidRequest: Too many, or a key or value is too long.
    """
    if len(labels) > MOST_LABELS:
        raise _invalid(name, f"has {len(labels)} entries; the limit is {MOST_LABELS}")
    for key, value in labels.items():
        if not 1 <= len(key.encode()) <= LONGEST_LABEL_KEY:
            raise _invalid(name, f"has a key of {len(key.encode())} bytes; use 1 to {LONGEST_LABEL_KEY}")
        if len(value.encode()) > LONGEST_LABEL_VALUE:
            raise _invalid(name, f"has a value of {len(value.encode())} bytes; the limit is {LONGEST_LABEL_VALUE}")


def domain_error(error: AdapterFormatError, field_name: str) -> LoramuxServerError:
    """Turn an error of the adapter format into one of the server's.

    Args:
        error: Its message holds no path.
        field_name: Request field that brought it in.
    """
    reason = Reason(error.reason)
    kind = InvalidRequest if reason is Reason.INVALID_PARAMETER else FailedPrecondition
    return kind(reason, error.message, field=field_name, metadata={"subject": error.field[:128]})


def _check_files(files: Sequence[FileRecord]) -> FileRecord:
    for index, file in enumerate(files[:16]):
        name = f"files[{index}].name"
        if file.name.lower().endswith(_PICKLES):
            raise _invalid(name, f"{echo(file.name)} may hold pickled code, which is never read; save {TENSORS_NAME}")
        if file.name in (CONFIG_NAME, MANIFEST_NAME):
            raise _invalid(name, f"{file.name} goes into the request itself, not into files")
        if file.name != TENSORS_NAME:
            raise _invalid(name, f"{echo(file.name)} is no file of an adapter; list {TENSORS_NAME} alone")
    if len(files) != 1:
        raise _invalid("files", f"has {len(files)} entries; list exactly {TENSORS_NAME}")
    (tensors,) = files
    if tensors.size < 1:
        raise _invalid("files[0].size", "is 0; give the size in bytes")
    if not _DIGEST.fullmatch(tensors.sha256):
        raise _invalid("files[0].sha256", "is no sha256; give 64 lower-case hexadecimal digits")
    return tensors


def _check_format(name: str, parse: Callable[[bytes], object], data: bytes) -> None:
    try:
        parse(data)
    except AdapterFormatError as error:
        raise domain_error(error, name) from error


def _invalid(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(Reason.INVALID_PARAMETER, f"{name} {what}", field=name)
