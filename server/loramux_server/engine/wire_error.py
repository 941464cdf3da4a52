"""What the front end is told of an exception: a reason and a message, never a stack or a path."""

from loramux_server.engine.messages import ErrorSpec
from loramux_server.errors import LoramuxServerError, Reason


def error_spec(error: Exception) -> ErrorSpec:
    """What the front end is told of an exception; foreign exceptions keep their text in the log."""
    if isinstance(error, LoramuxServerError):
        return ErrorSpec(
            reason=error.reason.value, message=error.message, retry_after=error.retry_after, field=error.field or ""
        )
    if isinstance(error, OSError):
        return ErrorSpec(reason=Reason.STORE_UNAVAILABLE.value, message="adapter version could not be read")
    kind = type(error).__name__
    return ErrorSpec(reason=Reason.INTERNAL.value, message=f"adapter version could not be loaded ({kind})")
