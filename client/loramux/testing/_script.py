"""What a test tells the fake server to do, and what it hears back."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.rpc import error_details_pb2, status_pb2

from loramux._status import CODE_NAMES
from loramux._types import FinishReason


class FakeError(Exception):
    """A failure that the fake server answers.

    Args:
        code: gRPC status code by name, for example `UNAVAILABLE`.
        reason: Reason in the details; empty sends a status without details, as gRPC itself or a proxy would.
        message: Status text.
        metadata: Further facts in the details.
        retry_after: Seconds of a RetryInfo.
        pushback_ms: Value of `grpc-retry-pushback-ms`; negative forbids a retry.
        field_violations: Pairs of field and description.
        headers_first: Whether response headers go out before the failure, which commits the call.
    """

    def __init__(
        self,
        code: str,
        reason: str = "",
        message: str = "scripted failure",
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        pushback_ms: int | None = None,
        field_violations: Sequence[tuple[str, str]] = (),
        headers_first: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        self.pushback_ms = pushback_ms
        self.field_violations = tuple(field_violations)
        self.headers_first = headers_first

    def status(self) -> status_pb2.Status:
        """Return the status with its details."""
        status = status_pb2.Status(code=CODE_NAMES.index(self.code), message=self.message)
        if self.reason:
            info = error_details_pb2.ErrorInfo(reason=self.reason, domain="loramux", metadata=self.metadata)
            status.details.add().Pack(info)
        if self.field_violations:
            bad = error_details_pb2.BadRequest()
            for name, description in self.field_violations:
                bad.field_violations.add(field=name, description=description)
            status.details.add().Pack(bad)
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(round(self.retry_after * 1e9))
            status.details.add().Pack(retry)
        return status

    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the trailing metadata."""
        result: list[tuple[str, str | bytes]] = []
        status = self.status()
        if status.details:
            result.append(("grpc-status-details-bin", status.SerializeToString()))
        if self.pushback_ms is not None:
            result.append(("grpc-retry-pushback-ms", str(self.pushback_ms)))
        return tuple(result)


@dataclass(frozen=True, slots=True)
class Reply:
    """A scripted answer to one generation.

    Attributes:
        pieces: Texts of the deltas, in order.
        finish_reason: Why each sequence ends.
        delay: Seconds before each delta.
        error: Failure after the last piece; None for a good end.
        hang: Whether nothing comes after the last piece until the call is cancelled.
        truncated: Whether the stream ends well, but without Finished and Usage.
    """

    pieces: Sequence[str]
    finish_reason: FinishReason = field(default=FinishReason.STOP, kw_only=True)
    delay: float = field(default=0.0, kw_only=True)
    error: FakeError | None = field(default=None, kw_only=True)
    hang: bool = field(default=False, kw_only=True)
    truncated: bool = field(default=False, kw_only=True)


@dataclass(slots=True)
class RecordedCall:
    """A call that the fake server got.

    Attributes:
        method: Name of the method, for example `Generate`.
        metadata: Metadata by key.
        request: The protobuf message; None for an upload stream.
        time_remaining: Seconds to the deadline when it came; None without one.
        cancelled: Whether the caller ended it early.
        ended: Set when the server has done with it.
    """

    method: str
    metadata: Mapping[str, str]
    request: Any
    time_remaining: float | None
    cancelled: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
