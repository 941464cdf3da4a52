"""Makes a version of an adapter's directory and moves the traffic to it, the way an upload and a promote do.

Traffic moves when the content of a directory changes: it is not what was last taken from there, or the adapter has no
such version yet. Otherwise what an operator did meanwhile stays, be it another version in the traffic or a deletion.
"""

import asyncio
import threading

from loramux_base.adapter import CONFIG_NAME, MANIFEST_NAME, TENSORS_NAME
from loramux_server.errors import FailedPrecondition, Reason
from loramux_server.lora.adapter_directory import AdapterDirectory, AdapterEntry
from loramux_server.lora.lifecycle import AdapterLifecycle
from loramux_server.lora.taken_content import Taken, TakenContent, content_of
from loramux_server.lora.upload_request import UploadRequest, check_upload_request
from loramux_server.tenancy.names import SHORT_DIGITS, AdapterReference
from loramux_server.tenancy.records import AdapterState, FileRecord, TargetRecord, VersionRecord, VersionState


class DirectoryPublisher:
    """See the module.

    Args:
        directory: Where the adapters come from.
        lifecycle: Takes them.
        taken: What was taken before.
    """

    def __init__(self, directory: AdapterDirectory, lifecycle: AdapterLifecycle, taken: TakenContent) -> None:
        self._directory = directory
        self._lifecycle = lifecycle
        self._taken = taken
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Let what reads in a thread end soon."""
        self._stopping.set()

    async def publish(self, entry: AdapterEntry) -> str:
        """Bring one adapter to the content of its directory.

        Returns:
            What became of it, for the log.

        Raises:
            EntryChanged: The files change while they are read.
            OSError: They cannot be read.
            LoramuxServerError: What an upload or a promote is refused with.
        """
        request, files = await self._read(entry)
        content = content_of(files)
        last = self._taken.get(entry.tenant, entry.adapter)
        state = self._state(entry)
        ready = {} if state is None else {v.digest: v for v in state.versions if v.state is VersionState.READY}
        version = next((found for found in ready.values() if found.files == files), None)
        if last is not None and last.content == content and last.digest:
            return _unchanged(state, last.digest, deleted=last.digest not in ready)
        if last is None and version is not None and state is not None and state.adapter.traffic:
            return await self._adopt(entry, content, version, state)
        # Written first, so that a restart in between goes on where this ends.
        await self._remember(entry, Taken(content=content, digest=""))
        if version is None:
            version = await self._upload(entry, request)
        shown = version.digest[:SHORT_DIGITS]
        if last is not None and last.digest == version.digest and version.digest in ready:
            await self._remember(entry, Taken(content=content, digest=version.digest))
            return f"is version {shown} still: what changed makes no difference to it"
        if not _serves_alone(self._state(entry), version.digest):
            named = AdapterReference(tenant=entry.tenant, adapter=entry.adapter, version=version.digest)
            await self._lifecycle.update(entry.tenant, _adapter_of(named), traffic=[(named, 1)])
        await self._remember(entry, Taken(content=content, digest=version.digest))
        return f"is taken as version {shown} and has the traffic"

    # --- internals -------------------------------------------------------------------------------------------------

    async def _read(self, entry: AdapterEntry) -> tuple[UploadRequest, tuple[FileRecord, ...]]:
        """What an upload would announce, and the records of all files."""
        limits = self._lifecycle.upload_limits
        for name in (CONFIG_NAME, TENSORS_NAME):
            if entry.size(name) is None:
                raise _refused(name, "is missing; a directory of an adapter holds it")
        total = sum(item.size for item in entry.files)
        if total > limits.adapter_bytes:
            raise _refused(TENSORS_NAME, f"makes {total} bytes in all; the limit is {limits.adapter_bytes}")
        config = await self._whole(entry, CONFIG_NAME, limits.config_bytes)
        manifest = None
        if entry.size(MANIFEST_NAME) is not None:
            manifest = await self._whole(entry, MANIFEST_NAME, limits.manifest_bytes)
        names = sorted(item.name for item in entry.files)
        files = tuple([await asyncio.to_thread(self._directory.record, entry, name, self._stopping) for name in names])
        request = check_upload_request(
            adapter=entry.adapter,
            config=config,
            manifest=manifest,
            files=[file for file in files if file.name == TENSORS_NAME],
            labels={},
            limits=limits,
            allow_unverified=self._lifecycle.allow_unverified,
        )
        return request, files

    async def _whole(self, entry: AdapterEntry, name: str, limit: int) -> bytes:
        """A small file; one byte over the limit of it is enough for the check that refuses it."""
        return await asyncio.to_thread(self._directory.read, entry, name, 0, limit + 1)

    async def _upload(self, entry: AdapterEntry, request: UploadRequest) -> VersionRecord:
        lifecycle, chunk = self._lifecycle, self._lifecycle.upload_limits.chunk_bytes
        upload = await lifecycle.start_upload(entry.tenant, request)
        while upload.committed_bytes < upload.total_bytes:
            offset = upload.committed_bytes
            data = await asyncio.to_thread(self._directory.read, entry, TENSORS_NAME, offset, chunk)
            upload = await lifecycle.write_upload(entry.tenant, upload.upload_id, offset, data)
        return await lifecycle.finish_upload(entry.tenant, upload.upload_id)

    async def _adopt(self, entry: AdapterEntry, content: str, version: VersionRecord, state: AdapterState) -> str:
        """Take note of a version that the adapter had before its directory was known of."""
        await self._remember(entry, Taken(content=content, digest=version.digest))
        return f"is {_standing(state, version.digest)}"

    async def _remember(self, entry: AdapterEntry, taken: Taken) -> None:
        await asyncio.to_thread(self._taken.set, entry.tenant, entry.adapter, taken)

    def _state(self, entry: AdapterEntry) -> AdapterState | None:
        return self._lifecycle.table.adapters.get((entry.tenant, entry.adapter))


def _adapter_of(version: AdapterReference) -> AdapterReference:
    return AdapterReference(tenant=version.tenant, adapter=version.adapter)


def _serves_alone(state: AdapterState | None, digest: str) -> bool:
    return state is not None and state.adapter.traffic == (TargetRecord(digest=digest, weight=1),)


def _unchanged(state: AdapterState | None, digest: str, *, deleted: bool) -> str:
    if deleted or state is None:
        return (
            f"is version {digest[:SHORT_DIGITS]}, which was taken before and has been deleted since: it stays deleted "
            "until other content is put there; upload it to have it back"
        )
    return f"is {_standing(state, digest)}"


def _standing(state: AdapterState, digest: str) -> str:
    """A version that the adapter has, and whether the traffic goes there."""
    shown = digest[:SHORT_DIGITS]
    if any(target.digest == digest for target in state.adapter.traffic):
        return f"version {shown}, which is served already"
    return f"version {shown}, which the adapter has; its traffic stays where an operator put it"


def _refused(name: str, what: str) -> FailedPrecondition:
    return FailedPrecondition(Reason.ADAPTER_INCOMPATIBLE, f"{name} {what}", field=name)
