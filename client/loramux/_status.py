"""From a gRPC status to an error of the SDK."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from loramux._connection_hint import connection_hint
from loramux._errors import (
    AdapterIncompatible,
    AdapterNotFound,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    LoramuxError,
    NotAuthenticated,
    NotFound,
    NotServedYet,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ServerError,
    Unavailable,
)

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

# Numbers of google.rpc.Code, which are those of gRPC.
CODE_NAMES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)

_BY_CODE: dict[str, type[LoramuxError]] = {
    "CANCELLED": Cancelled,
    "UNKNOWN": ServerError,
    "INVALID_ARGUMENT": InvalidRequest,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": Conflict,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": Overloaded,
    "FAILED_PRECONDITION": Conflict,
    "ABORTED": Conflict,
    "OUT_OF_RANGE": InvalidRequest,
    "UNIMPLEMENTED": NotServedYet,
    "INTERNAL": ServerError,
    "UNAVAILABLE": Unavailable,
    "DATA_LOSS": ServerError,
    "UNAUTHENTICATED": NotAuthenticated,
}

# Only reasons whose class is not the one of their code.
_BY_REASON: dict[str, type[LoramuxError]] = {
    "ADAPTER_NOT_FOUND": AdapterNotFound,
    "ADAPTER_INCOMPATIBLE": AdapterIncompatible,
    "ADAPTER_NUMERICS": AdapterIncompatible,
    "TENANT_QUOTA": QuotaExceeded,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failed attempt of a call.

    Attributes:
        error: What the caller gets unless a retry helps.
        pushback: Seconds that the server asks to wait, negative for "do not retry", None if it said nothing.
        headers_seen: Whether response headers had arrived: then the call is committed and never retried.
    """

    error: LoramuxError
    pushback: float | None = None
    headers_seen: bool = False


def _details(data: bytes | None) -> status_pb2.Status | None:
    """Parse the binary details; None if there are none or they are not a status."""
    if data is None:
        return None
    try:
        return status_pb2.Status.FromString(data)
    except DecodeError:
        # Details of a proxy that are not ours must not hide the status itself.
        return None


def error_from_status(status: status_pb2.Status, *, request_id: str | None = None) -> LoramuxError:
    """Build the error of a status with details, as it comes in a trailer or for an item of a batch.

    Args:
        status: The status; a code that gRPC does not know counts as UNKNOWN.
        request_id: Correlation id of the call.
    """
    code = CODE_NAMES[status.code] if 0 < status.code < len(CODE_NAMES) else "UNKNOWN"
    reason = ""
    metadata: dict[str, str] = {}
    retry_after: float | None = None
    violations: list[FieldViolation] = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        try:
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                violations += [FieldViolation(field=v.field, description=v.description) for v in bad.field_violations]
            elif detail.Unpack(retry):
                retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        except DecodeError:
            # A detail that cannot be read is left out; code and text still say what happened.
            continue
    cls = _BY_REASON.get(reason) or _BY_CODE[code]
    return cls(
        status.message,
        code=code,
        reason=reason,
        metadata=metadata,
        retry_after=retry_after,
        request_id=request_id,
        field_violations=tuple(violations),
    )


def failure_from_call(
    code: str,
    message: str,
    trailers: Iterable[tuple[str, str | bytes]],
    *,
    headers_seen: bool,
    request_id: str | None = None,
    tls: bool | None = None,
) -> Failure:
    """Build the failure of a call from what gRPC says about it.

    Args:
        code: Name of the status code.
        message: Status text.
        trailers: Trailing metadata.
        headers_seen: Whether response headers had arrived.
        request_id: Correlation id of the call.
        tls: Whether the connection uses TLS; None if that is not known.
    """
    details: bytes | None = None
    pushback: float | None = None
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            details = value
        elif key == PUSHBACK_KEY:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            # gRFC A6: a value that is not a number means "do not retry".
            pushback = int(text) / 1000 if text.isdecimal() else -1.0
    status = _details(details)
    if status is None or status.code >= len(CODE_NAMES) or CODE_NAMES[status.code] != code:
        status = status_pb2.Status(code=CODE_NAMES.index(code) if code in CODE_NAMES else 2, message=message)
    if code == "DEADLINE_EXCEEDED" and details is None:
        # Made by gRPC on this side, whose words say neither what was up nor what to do.
        status.message = f"the timeout passed before the answer was complete; allow more time ({message})"
    elif code == "UNAVAILABLE" and details is None and (hint := connection_hint(message, tls=tls)) is not None:
        status.message = f"{hint} ({message})"
    error = error_from_status(status, request_id=request_id)
    if pushback is not None and pushback >= 0 and error.retry_after is None:
        error.retry_after = pushback
    return Failure(error=error, pushback=pushback, headers_seen=headers_seen)
