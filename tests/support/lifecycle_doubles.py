"""Doubles for tests about the life of adapters: an engine that keeps a journal and a validator that needs no model."""

import asyncio
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from loramux_server.engine.messages import AliasSpec, VersionSpec
from loramux_server.errors import LoramuxServerError
from loramux_server.lora.upload_request import UploadRequest
from loramux_server.tenancy.records import FileRecord, NewVersion

CONFIG = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}).encode()


def digest_of(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def tensors_record(data: bytes) -> FileRecord:
    return FileRecord(name="adapter_model.safetensors", size=len(data), sha256=digest_of(data))


def upload_request(data: bytes, adapter: str = "bot", **labels: str) -> UploadRequest:
    return UploadRequest(adapter=adapter, config=CONFIG, manifest=None, tensors=tensors_record(data), labels=labels)


def new_version(adapter: str = "bot", content: str = "v1", tenant: str = "default") -> NewVersion:
    return NewVersion(
        tenant=tenant,
        adapter=adapter,
        digest=digest_of(content),
        files=(tensors_record(content.encode()),),
        max_rank=8,
        modules=("q_proj",),
        slab_units=1,
        tensor_bytes=len(content),
        base_fingerprint="",
        base_verified=False,
    )


@dataclass(frozen=True, kw_only=True)
class Validated:
    digest: str
    rank: int = 8
    rank_units: int = 1
    modules: tuple[str, ...] = ("q_proj",)
    tensor_bytes: int = 1
    base_fingerprint: str = ""
    base_verified: bool = False


@dataclass
class FakeValidator:
    """Takes every directory; the digest is that of the tensors. `gate` holds it up, `error` makes it refuse."""

    error: LoramuxServerError | None = None
    gate: asyncio.Event | None = None
    calls: int = 0
    directories: list[Path] = field(default_factory=list)

    async def validate(self, directory: Path) -> Validated:
        self.calls += 1
        self.directories.append(directory)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Validated(digest=digest_of((directory / "adapter_model.safetensors").read_bytes()))


@dataclass
class FakeEngine:
    """Keeps what it was told, in order; `error` makes preload and unload fail, `gate` holds them up."""

    journal: list[tuple[str, str]] = field(default_factory=list)
    aliases: list[AliasSpec] = field(default_factory=list)
    versions: list[VersionSpec] = field(default_factory=list)
    error: LoramuxServerError | None = None
    gate: asyncio.Event | None = None

    def put_version(self, spec: VersionSpec) -> None:
        self.journal.append(("put_version", spec.version))
        self.versions.append(spec)

    def drop_version(self, version: str) -> None:
        self.journal.append(("drop_version", version))

    def put_alias(self, spec: AliasSpec) -> None:
        self.journal.append(("put_alias", spec.alias))
        self.aliases.append(spec)

    def drop_alias(self, alias: str, revision: int) -> None:
        self.journal.append(("drop_alias", alias))

    async def preload(self, version: str) -> None:
        await self._operate("preload", version)

    async def unload(self, version: str) -> None:
        await self._operate("unload", version)

    async def _operate(self, what: str, version: str) -> None:
        self.journal.append((what, version))
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
