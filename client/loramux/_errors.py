"""Errors of the SDK: one tree, by meaning.

```
LoramuxError                    code, reason, metadata, retry_after, generation_id, request_id, field_violations
├── InvalidRequest              can never succeed as it stands (also a ValueError; raised locally as well)
├── NotAuthenticated            no valid credential
├── PermissionDenied            the credential does not allow it
├── NotFound                    the named thing does not exist, or not for this tenant
│   └── AdapterNotFound         the adapter or version
├── AdapterIncompatible         wrong base, shape, rank or numbers of an adapter
├── Conflict                    the state forbids it: changed meanwhile, in use, already there
├── QuotaExceeded               a quota of the tenant
├── Overloaded                  a limit of the server: full queue, memory, adapter slots, slow reader
├── Unavailable                 a part of the server is away, or the server cannot be reached
├── DeadlineExceeded            the time is up (also a TimeoutError)
├── StreamInterrupted           a stream ended without its end: partial, tokens_received, outputs
├── NotServedYet                the API has it, this server does not serve it yet
├── Cancelled                   the call was cancelled by the server or by a proxy
├── ServerError                 a bug of the server; its log has the cause under request_id
└── ClientStateError            misuse of the client: closed, forked, another loop (also a RuntimeError)
```

Every error can be pickled. A cancelled asyncio task stays an `asyncio.CancelledError`. Reasons that this version does
not know are kept as they are; the class then follows from the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux._types import Output


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """A field of the request and what is wrong with it.

    Attributes:
        field: Path of the field, for example `sampling.temperature`.
        description: What is wrong and the way out.
    """

    field: str
    description: str


class LoramuxError(Exception):
    """Root of the tree.

    Attributes:
        message: Text for the developer.
        code: gRPC status code by name, for example `NOT_FOUND`.
        reason: Machine-readable cause, for example `ADAPTER_NOT_FOUND`; empty if the server gave none.
        metadata: Further facts by name.
        retry_after: Seconds after which a retry may succeed; None if the server named none.
        generation_id: The generation that failed, once it had started.
        request_id: Correlation id of the call, as sent in `x-request-id`; None for local errors.
        field_violations: Fields of the request that were refused.
    """

    default_code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        generation_id: str | None = None,
        request_id: str | None = None,
        field_violations: tuple[FieldViolation, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = type(self).default_code if code is None else code
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after = retry_after
        self.generation_id = generation_id
        self.request_id = request_id
        self.field_violations = field_violations

    def __str__(self) -> str:
        """Text with reason, request id and fields, so that a log line is enough to act on."""
        parts = [self.message, f"[{self.reason or self.code}]"]
        if self.request_id:
            parts.append(f"(request {self.request_id})")
        parts += [
            f"{violation.field}: {violation.description}"
            for violation in self.field_violations
            if violation.description not in self.message  # said already
        ]
        return " ".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by class, text and attributes: keyword-only arguments do not survive the default."""
        return _rebuild, (type(self), self.message), self.__dict__


def _rebuild(cls: type[LoramuxError], message: str) -> LoramuxError:
    """Make an error for `pickle`, which then sets the attributes."""
    return cls(message)


class InvalidRequest(LoramuxError, ValueError):
    """The request can never succeed as it stands. Raised locally too, before anything is sent."""

    default_code = "INVALID_ARGUMENT"


class NotAuthenticated(LoramuxError):
    """There is no valid credential."""

    default_code = "UNAUTHENTICATED"


class PermissionDenied(LoramuxError):
    """The credential does not allow this, or not for this tenant."""

    default_code = "PERMISSION_DENIED"


class NotFound(LoramuxError):
    """The named thing does not exist, or not for this tenant."""

    default_code = "NOT_FOUND"


class AdapterNotFound(NotFound):
    """The adapter or version does not exist, or not for this tenant."""


class AdapterIncompatible(LoramuxError):
    """The adapter does not fit the server: another base, wrong shapes, too high a rank, numbers that are not finite."""

    default_code = "FAILED_PRECONDITION"


class Conflict(LoramuxError):
    """The state forbids it: somebody changed it meanwhile, it is in use, or it is already there."""

    default_code = "ABORTED"


class QuotaExceeded(LoramuxError):
    """A quota of the tenant is used up; `retry_after` says for how long, if that can be known."""

    default_code = "RESOURCE_EXHAUSTED"


class Overloaded(LoramuxError):
    """The server is at one of its limits: full queue, memory, adapter slots, or a reader that is too slow."""

    default_code = "RESOURCE_EXHAUSTED"


class Unavailable(LoramuxError):
    """A part of the server is away or the server cannot be reached. The SDK has already retried."""

    default_code = "UNAVAILABLE"


class DeadlineExceeded(LoramuxError, TimeoutError):
    """The time given for the call is up."""

    default_code = "DEADLINE_EXCEEDED"


class NotServedYet(LoramuxError):
    """The API has this call or option, but this server does not serve it yet."""

    default_code = "UNIMPLEMENTED"


class Cancelled(LoramuxError):
    """The call was cancelled by the server or by a proxy."""

    default_code = "CANCELLED"


class ServerError(LoramuxError):
    """A bug of the server; its log has the cause under `request_id`."""

    default_code = "INTERNAL"


class ClientStateError(LoramuxError, RuntimeError):
    """The client or stream cannot be used like this: closed, forked, from another loop, or outside of its block."""

    default_code = "FAILED_PRECONDITION"


class StreamInterrupted(LoramuxError):
    """A stream ended without its end.

    Attributes:
        partial: Text that arrived, of the first sequence.
        tokens_received: Tokens that arrived, of all sequences.
        outputs: What arrived of every sequence; `finish_reason` is `INTERRUPTED` for those without an end.
    """

    default_code = "UNAVAILABLE"

    partial: str = ""
    tokens_received: int = 0
    outputs: tuple[Output, ...] = ()
