"""Adapter calls of the blocking client."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from loramux import _adapter_events as events
from loramux import _adapter_requests as requests
from loramux import _methods as methods
from loramux._adapter_types import (
    Adapter,
    AdapterResidency,
    AdapterVersion,
    Grant,
    ResidencyLevel,
    UsageEntry,
    VersionState,
)
from loramux._connection import View, checked_timeout
from loramux._status import Failure
from loramux._streaming import AdapterWatch
from loramux._transport import StreamCall, Transport
from loramux._upload import LocalAdapter, Progress, UploadPosition, local_adapter, remaining
from loramux.v1 import adapter_pb2 as pb

UPLOAD_TIMEOUT = 3600.0


class Adapters:
    """Adapters of the acted-for tenant: `client.adapters`.

    An adapter is named `{a}` or `tenants/{t}/adapters/{a}`; a version is an `AdapterVersion`, its full name, or `{v}`.
    Every change is made once, however often it has to be sent. All calls raise a `LoramuxError` if they fail:
    `AdapterNotFound` for what does not exist or is another tenant's, `Conflict` if an etag is stale.
    """

    def __init__(self, transport: Transport, view: View) -> None:
        self._transport = transport
        self._view = view

    def upload(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        promote: bool = False,
        labels: Mapping[str, str] | None = None,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> AdapterVersion:
        """Send a PEFT directory and make a version of it.

        Only adapter_config.json, adapter_model.safetensors and loramux_manifest.json are read and sent, a piece at a
        time; a broken connection resumes where the server got to. Equal bytes give the same version.

        Args:
            path: The directory.
            name: Adapter that the version will belong to; it is created if needed.
            promote: Whether the version gets all traffic at once.
            labels: Labels for an adapter that is created.
            timeout: Seconds for all of it; None for an hour, `math.inf` for no limit.
            progress: Called with bytes sent and bytes in all, in the thread that sends; an error of it ends the upload.

        Returns:
            The version, READY.

        Raises:
            InvalidRequest: The directory is no adapter, or the server refused a field of it.
            AdapterIncompatible: It does not fit the server's base, or has numbers that are not finite.
            QuotaExceeded: The tenant may have no more adapters or bytes.
        """
        local = local_adapter(path)
        limit = checked_timeout(timeout, UPLOAD_TIMEOUT)
        deadline = math.inf if limit is None else self._transport.clock.now() + limit
        started = self._transport.unary(
            methods.START_UPLOAD, local.start_request(name, labels), self._view, timeout=self._left(deadline)
        )
        position = UploadPosition(started.upload)
        self._write(local, position, deadline, progress)
        finished = self._transport.unary(
            methods.FINISH_UPLOAD,
            pb.FinishAdapterUploadRequest(upload_id=position.upload_id, idempotency_key=requests.idempotency_key()),
            self._view,
            timeout=self._left(deadline),
        )
        version = events.version(finished.version)
        if promote:
            self._update(
                requests.traffic_update(started.upload.adapter, [(version, 1)], warm=True, etag=None),
                timeout=self._left(deadline),
            )
        return version

    def _left(self, deadline: float) -> float:
        """Seconds to the deadline of an upload."""
        return remaining(deadline, self._transport.clock.now())

    def _write(self, local: LocalAdapter, position: UploadPosition, deadline: float, progress: Progress | None) -> None:
        """Send the bytes, resuming while the upload gets further."""
        attempts = self._transport.attempts(self._left(deadline))
        while not position.complete:
            pieces = local.pieces(position.upload_id, position.committed, progress)
            outcome = self._transport.send_stream(
                methods.WRITE_UPLOAD, pieces, self._view, timeout=self._left(deadline)
            )
            pieces.check()
            if not isinstance(outcome, Failure):
                if not position.move(outcome.upload):
                    raise position.stalled()
                continue
            if not position.lost(outcome.error):
                delay = attempts.wait_for(outcome)
                if delay is None:
                    raise outcome.error
                self._transport.pause(delay)
            answer = self._transport.unary(
                methods.GET_UPLOAD,
                pb.GetAdapterUploadRequest(upload_id=position.upload_id),
                self._view,
                timeout=self._left(deadline),
            )
            if position.move(answer.upload):
                attempts = self._transport.attempts(self._left(deadline))

    def promote(
        self, name: str, version: str | AdapterVersion, *, warm: bool = True, etag: str | None = None
    ) -> Adapter:
        """Give all traffic to one version. Requests that were admitted before finish on the old one.

        Args:
            name: The adapter.
            version: The version.
            warm: Whether it is made resident first.
            etag: `Adapter.etag` that must still be current; None for no check.
        """
        return self._update(requests.traffic_update(name, [(version, 1)], warm=warm, etag=etag))

    def rollback(self, name: str, *, warm: bool = True) -> Adapter:
        """Give all traffic back to the version that served before.

        Raises:
            Conflict: There is none, or somebody changed the adapter meanwhile.
        """
        return self._update(requests.rollback_update(self.get(name), warm=warm))

    def set_traffic(
        self,
        name: str,
        traffic: Mapping[str, int] | Sequence[tuple[str | AdapterVersion, int]],
        *,
        warm: bool = True,
        etag: str | None = None,
    ) -> Adapter:
        """Split the traffic by weight; nothing means that no version serves.

        Args:
            name: The adapter.
            traffic: Weight, 1 to 10,000, by version.
            warm: Whether versions that come in are made resident first.
            etag: `Adapter.etag` that must still be current; None for no check.
        """
        return self._update(requests.traffic_update(name, traffic, warm=warm, etag=etag))

    def set_labels(self, name: str, labels: Mapping[str, str], *, etag: str | None = None) -> Adapter:
        """Replace the labels of an adapter."""
        return self._update(requests.labels_update(name, labels, etag=etag))

    def pin(
        self,
        name: str,
        version: str | AdapterVersion | None = None,
        *,
        expire_time: datetime | None = None,
        etag: str | None = None,
    ) -> Adapter:
        """Keep a version resident on every replica.

        Args:
            name: The adapter.
            version: The version; None for the one that serves.
            expire_time: When the pin ends by itself, with a time zone; None if it does not.
            etag: `Adapter.etag` that must still be current; None for no check.
        """
        return self._update(requests.pin_update(name, version, expire_time, etag=etag))

    def unpin(self, name: str, *, etag: str | None = None) -> Adapter:
        """Take the pin of an adapter away."""
        return self._update(requests.unpin_update(name, etag=etag))

    def _update(self, request: pb.UpdateAdapterRequest, *, timeout: float | None = None) -> Adapter:
        """Change an adapter."""
        return events.adapter(
            self._transport.unary(methods.UPDATE_ADAPTER, request, self._view, timeout=timeout).adapter
        )

    def get(self, name: str) -> Adapter:
        """Read one adapter."""
        request = pb.GetAdapterRequest(name=requests.named(name))
        return events.adapter(self._transport.unary(methods.GET_ADAPTER, request, self._view).adapter)

    def get_version(self, name: str, version: str | AdapterVersion) -> AdapterVersion:
        """Read one version of an adapter."""
        request = pb.GetAdapterVersionRequest(name=requests.version_name(name, version))
        return events.version(self._transport.unary(methods.GET_VERSION, request, self._view).version)

    def list(
        self,
        *,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        include_granted: bool = False,
        page_size: int = 100,
    ) -> Iterator[Adapter]:
        """Iterate over adapters by name; pages are read as they are needed.

        Args:
            prefix: Only names that start with this.
            labels: Only adapters with all of these labels.
            include_granted: Whether adapters that other tenants granted come as well.
            page_size: Adapters a call, 1 to 1,000.
        """
        request = requests.list_request(
            prefix=prefix, labels=labels, include_granted=include_granted, page_size=page_size
        )
        while True:
            page = self._transport.unary(methods.LIST_ADAPTERS, request, self._view)
            for adapter in page.adapters:
                yield events.adapter(adapter)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def versions(
        self, name: str, *, states: Sequence[VersionState] = (), page_size: int = 100
    ) -> Iterator[AdapterVersion]:
        """Iterate over versions of an adapter, newest first; pages are read as they are needed.

        Args:
            name: The adapter.
            states: Only versions in one of these states; nothing means all but DELETED.
            page_size: Versions a call, 1 to 1,000.
        """
        request = requests.versions_request(name, states=states, page_size=page_size)
        while True:
            page = self._transport.unary(methods.LIST_VERSIONS, request, self._view)
            for version in page.versions:
                yield events.version(version)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch(self, *, prefix: str = "", include_granted: bool = False) -> AdapterWatch:
        """Watch adapters: `with client.adapters.watch() as events: for event in events: ...`.

        Args:
            prefix: Only names that start with this.
            include_granted: Whether adapters that other tenants granted are watched as well.
        """
        request = pb.WatchAdaptersRequest(name_prefix=prefix, include_granted=include_granted)
        return AdapterWatch(
            lambda: StreamCall(self._transport, methods.WATCH_ADAPTERS, request, self._view, timeout=None)
        )

    def preload(self, name: str, *, level: ResidencyLevel = ResidencyLevel.DEVICE) -> tuple[AdapterResidency, ...]:
        """Make an adapter's serving versions, or `{a}@{v}`, resident on the replica that gets the call."""
        request = requests.preload_request(name, level)
        answer = self._transport.unary(methods.PRELOAD_ADAPTER, request, self._view)
        return tuple(events.residency(entry) for entry in answer.residency)

    def unload(self, name: str) -> tuple[AdapterResidency, ...]:
        """Give up the residency of an adapter, or of `{a}@{v}`, on the replica that gets the call."""
        request = pb.UnloadAdapterRequest(name=requests.named(name))
        answer = self._transport.unary(methods.UNLOAD_ADAPTER, request, self._view)
        return tuple(events.residency(entry) for entry in answer.residency)

    def delete(self, name: str, *, etag: str | None = None) -> None:
        """Delete an adapter with all its versions. Running requests finish."""
        request = pb.DeleteAdapterRequest(
            name=requests.named(name), etag=etag or "", idempotency_key=requests.idempotency_key()
        )
        self._transport.unary(methods.DELETE_ADAPTER, request, self._view)

    def delete_version(self, name: str, version: str | AdapterVersion) -> AdapterVersion:
        """Delete one version, which drains first.

        Raises:
            Conflict: It is in the adapter's traffic.
        """
        request = pb.DeleteAdapterVersionRequest(
            name=requests.version_name(name, version), idempotency_key=requests.idempotency_key()
        )
        return events.version(self._transport.unary(methods.DELETE_VERSION, request, self._view).version)

    def grant(self, name: str, grantee: str) -> Grant:
        """Let another tenant generate with an adapter."""
        request = pb.CreateGrantRequest(
            adapter=requests.named(name), grantee=grantee, idempotency_key=requests.idempotency_key()
        )
        return events.grant(self._transport.unary(methods.CREATE_GRANT, request, self._view).grant)

    def grants(self, name: str = "", *, page_size: int = 100) -> Iterator[Grant]:
        """Iterate over the grants on an adapter, or on all of the tenant."""
        request = requests.grants_request(name, page_size=page_size)
        while True:
            page = self._transport.unary(methods.LIST_GRANTS, request, self._view)
            for grant in page.grants:
                yield events.grant(grant)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def revoke(self, grant: str | Grant) -> None:
        """Take a grant back. Running requests finish."""
        name = grant.name if isinstance(grant, Grant) else grant
        request = pb.DeleteGrantRequest(name=requests.named(name), idempotency_key=requests.idempotency_key())
        self._transport.unary(methods.DELETE_GRANT, request, self._view)

    def usage(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        name: str = "",
        page_size: int = 100,
    ) -> Iterator[UsageEntry]:
        """Iterate over the usage ledger of the tenant, by adapter version.

        Args:
            start: Start of the span, with a time zone; None for the start of the ledger.
            end: End of the span, exclusive; None for now.
            name: Only this adapter; empty for all, the base included.
            page_size: Entries a call, 1 to 1,000.
        """
        request = requests.usage_request(start, end, adapter=name, page_size=page_size)
        while True:
            page = self._transport.unary(methods.GET_USAGE, request, self._view)
            for entry in page.entries:
                yield events.usage_entry(entry)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
