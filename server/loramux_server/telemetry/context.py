"""What every log record and span of one call carries: ids, in context variables that follow the call's task."""

import contextvars
import re
import secrets

CORRELATION_ID: contextvars.ContextVar[str] = contextvars.ContextVar("loramux_correlation_id", default="")
GENERATION_ID: contextvars.ContextVar[str] = contextvars.ContextVar("loramux_generation_id", default="")

_ACCEPTED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def correlation_id_from(value: str | bytes | None) -> str:
    """Return the caller's id when it is short and plain, else a fresh one.

    Args:
        value: Metadata `x-request-id` as received, untrusted.
    """
    if isinstance(value, str) and _ACCEPTED.fullmatch(value):
        return value
    return secrets.token_hex(16)
