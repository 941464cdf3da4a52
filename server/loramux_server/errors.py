"""Domain errors of the server: one tree, one reason each, no gRPC in sight.

```
LoramuxServerError(reason, message, *, field, metadata, retry_after)
├── InvalidRequest            INVALID_PARAMETER, PROMPT_TOO_LONG, GRAMMAR_INVALID, DIGEST_MISMATCH, IDEMPOTENCY_MISMATCH
├── NotServedYet              NOT_SERVED_YET
├── NotAuthenticated          UNAUTHENTICATED
├── AccessDenied              PERMISSION_DENIED
├── NotFound                  ADAPTER_NOT_FOUND, UPLOAD_NOT_FOUND, GENERATION_NOT_FOUND
├── AlreadyExists             ADAPTER_EXISTS
├── FailedPrecondition        ADAPTER_INCOMPATIBLE, ADAPTER_NUMERICS, VERSION_IN_USE
├── Conflict                  VERSION_CONFLICT
├── ResourceExhausted         QUEUE_FULL, TENANT_QUOTA, SLOW_READER, OUT_OF_MEMORY, ADAPTER_SLOTS_EXHAUSTED
├── Unavailable               ENGINE_UNAVAILABLE, STORE_UNAVAILABLE, ADAPTER_LOADING, DRAINING
├── Expired                   DEADLINE_EXCEEDED
└── Internal                  INTERNAL
```

`loramux_server.rpc` maps each class to one gRPC status code in one table; the engine sends `reason` and `message` over
its socket and the front end rebuilds the error with `from_reason`. Messages name a field, a number, an enum or an id,
and the way out; never prompt text, a path, a stack or another tenant's name.
"""

import enum
from collections.abc import Mapping


class Reason(enum.StrEnum):
    """Machine-readable cause, sent as `google.rpc.ErrorInfo.reason`."""

    INVALID_PARAMETER = "INVALID_PARAMETER"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    GRAMMAR_INVALID = "GRAMMAR_INVALID"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    IDEMPOTENCY_MISMATCH = "IDEMPOTENCY_MISMATCH"
    NOT_SERVED_YET = "NOT_SERVED_YET"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    UPLOAD_NOT_FOUND = "UPLOAD_NOT_FOUND"
    GENERATION_NOT_FOUND = "GENERATION_NOT_FOUND"
    ADAPTER_EXISTS = "ADAPTER_EXISTS"
    ADAPTER_INCOMPATIBLE = "ADAPTER_INCOMPATIBLE"
    ADAPTER_NUMERICS = "ADAPTER_NUMERICS"
    VERSION_IN_USE = "VERSION_IN_USE"
    VERSION_CONFLICT = "VERSION_CONFLICT"
    QUEUE_FULL = "QUEUE_FULL"
    TENANT_QUOTA = "TENANT_QUOTA"
    SLOW_READER = "SLOW_READER"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    ADAPTER_SLOTS_EXHAUSTED = "ADAPTER_SLOTS_EXHAUSTED"
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    ADAPTER_LOADING = "ADAPTER_LOADING"
    DRAINING = "DRAINING"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class LoramuxServerError(Exception):
    """Root of the tree.

    Args:
        reason: Why, as an enum; must be one that the class allows.
        message: For the caller: names the field, the value and the way out.
        field: Request field the error is about (`sampling.temperature`), if one is.
        metadata: Extra facts for `ErrorInfo.metadata`; short strings.
        retry_after: Seconds after which a retry may succeed; None when a retry cannot help.
    """

    reasons: frozenset[Reason] = frozenset()

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        assert reason in type(self).reasons, f"{type(self).__name__} cannot carry {reason}"
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


class InvalidRequest(LoramuxServerError):
    """The request can never succeed as it stands."""

    reasons = frozenset(
        {
            Reason.INVALID_PARAMETER,
            Reason.PROMPT_TOO_LONG,
            Reason.GRAMMAR_INVALID,
            Reason.DIGEST_MISMATCH,
            Reason.IDEMPOTENCY_MISMATCH,
        }
    )


class NotServedYet(LoramuxServerError):
    """The API has it, this server does not serve it yet."""

    reasons = frozenset({Reason.NOT_SERVED_YET})


class NotAuthenticated(LoramuxServerError):
    """No valid credential."""

    reasons = frozenset({Reason.UNAUTHENTICATED})


class AccessDenied(LoramuxServerError):
    """The credential does not allow it."""

    reasons = frozenset({Reason.PERMISSION_DENIED})


class NotFound(LoramuxServerError):
    """The named thing does not exist, or not for this tenant: the text is the same."""

    reasons = frozenset({Reason.ADAPTER_NOT_FOUND, Reason.UPLOAD_NOT_FOUND, Reason.GENERATION_NOT_FOUND})


class AlreadyExists(LoramuxServerError):
    """The name is taken."""

    reasons = frozenset({Reason.ADAPTER_EXISTS})


class FailedPrecondition(LoramuxServerError):
    """The state of the adapter forbids it."""

    reasons = frozenset({Reason.ADAPTER_INCOMPATIBLE, Reason.ADAPTER_NUMERICS, Reason.VERSION_IN_USE})


class Conflict(LoramuxServerError):
    """Somebody changed it meanwhile: read again and retry."""

    reasons = frozenset({Reason.VERSION_CONFLICT})


class ResourceExhausted(LoramuxServerError):
    """A limit was reached."""

    reasons = frozenset(
        {
            Reason.QUEUE_FULL,
            Reason.TENANT_QUOTA,
            Reason.SLOW_READER,
            Reason.OUT_OF_MEMORY,
            Reason.ADAPTER_SLOTS_EXHAUSTED,
        }
    )


class Unavailable(LoramuxServerError):
    """A part of the server is away; retry."""

    reasons = frozenset({Reason.ENGINE_UNAVAILABLE, Reason.STORE_UNAVAILABLE, Reason.ADAPTER_LOADING, Reason.DRAINING})


class Expired(LoramuxServerError):
    """The deadline passed before the work was done."""

    reasons = frozenset({Reason.DEADLINE_EXCEEDED})


class Internal(LoramuxServerError):
    """A bug of ours; the log has the stack under the correlation id."""

    reasons = frozenset({Reason.INTERNAL})


_CLASS_OF: dict[Reason, type[LoramuxServerError]] = {
    reason: cls for cls in LoramuxServerError.__subclasses__() for reason in cls.reasons
}


def from_reason(reason: str, message: str, *, retry_after: float | None = None) -> LoramuxServerError:
    """Rebuild an error that crossed the engine's socket.

    Args:
        reason: A `Reason` value; anything else becomes INTERNAL.
        message: The text for the caller.
        retry_after: Seconds, as in `LoramuxServerError`.
    """
    try:
        known = Reason(reason)
    except ValueError:
        return Internal(Reason.INTERNAL, message)
    return _CLASS_OF[known](known, message, retry_after=retry_after)
