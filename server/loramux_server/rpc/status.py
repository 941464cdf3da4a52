"""From a domain error to `google.rpc.Status`: one table, the details that fit, and a cap on their size.

Details travel in a trailer; 20 KB of them turn the call into RESOURCE_EXHAUSTED inside gRPC, so they are cut to 4 KiB.
"""

from collections.abc import Mapping

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from loramux_server.errors import (
    AccessDenied,
    AlreadyExists,
    Conflict,
    Expired,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    LoramuxServerError,
    NotAuthenticated,
    NotFound,
    NotServedYet,
    Reason,
    ResourceExhausted,
    Unavailable,
)

DOMAIN = "loramux"
MAX_DETAILS_BYTES = 4096
_MAX_MESSAGE_CHARS = 1024
_MAX_METADATA_ENTRIES = 16
_MAX_METADATA_CHARS = 128

STATUS_CODES: Mapping[type[LoramuxServerError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotServedYet: grpc.StatusCode.UNIMPLEMENTED,
    NotAuthenticated: grpc.StatusCode.UNAUTHENTICATED,
    AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    Conflict: grpc.StatusCode.ABORTED,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    Internal: grpc.StatusCode.INTERNAL,
}

Trailers = tuple[tuple[str, str | bytes], ...]


def code_of(error: LoramuxServerError) -> grpc.StatusCode:
    """Return the status code of an error's class."""
    return STATUS_CODES[type(error)]


def to_status(error: LoramuxServerError) -> status_pb2.Status:
    """Build the full status of an error: code, message and at most 4 KiB of details.

    Args:
        error: What happened. Its message is cut to 1,024 characters, its metadata to 16 entries of 128 characters.
    """
    message = error.message[:_MAX_MESSAGE_CHARS]
    status = status_pb2.Status(code=code_of(error).value[0], message=message)
    for detail in _details(error, message):
        packed = status.details.add()
        packed.Pack(detail)
        if status.ByteSize() > MAX_DETAILS_BYTES:
            del status.details[-1]
    return status


def trailers_of(status: status_pb2.Status, error: LoramuxServerError) -> Trailers:
    """Return the trailers that carry the details, and the push-back that gRPC's own retry loop obeys."""
    trailers: Trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    if error.retry_after is not None:
        trailers += (("grpc-retry-pushback-ms", str(max(0, round(error.retry_after * 1000)))),)
    return trailers


def _details(error: LoramuxServerError, message: str) -> list[Message]:
    metadata = {
        str(key)[:_MAX_METADATA_CHARS]: str(value)[:_MAX_METADATA_CHARS]
        for key, value in list(error.metadata.items())[:_MAX_METADATA_ENTRIES]
    }
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=metadata),
    ]
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(max(0, int(error.retry_after * 1e9)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field is not None and isinstance(error, InvalidRequest | NotServedYet):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field[:256], description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, NotFound | AlreadyExists):
        kind = error.reason.value.split("_", 1)[0].lower()
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=f"loramux.v1/{kind}",
                resource_name=metadata.get("name") or metadata.get("adapter", ""),
                description=message,
            )
        )
    if isinstance(error, FailedPrecondition):
        unmet = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason.value, subject=metadata.get("name", error.field or ""), description=message
        )
        details.append(error_details_pb2.PreconditionFailure(violations=[unmet]))
    if error.reason in (Reason.TENANT_QUOTA, Reason.QUEUE_FULL):
        over = error_details_pb2.QuotaFailure.Violation(subject=error.field or error.reason.value, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[over]))
    return details
