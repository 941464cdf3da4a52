"""Page tokens: opaque to the caller, bound to the tenant and the filters that they were made for."""

import base64
import binascii
import hashlib
from collections.abc import Sequence

import msgspec

from loramux_server.errors import InvalidRequest, Reason

DEFAULT_PAGE = 100
LARGEST_PAGE = 1000
_LONGEST_TOKEN = 512
_MOST_DIGITS = 18  # fits the database's 64-bit integers


class _Token(msgspec.Struct, frozen=True, array_like=True):
    query: bytes
    position: str


def check_page_size(size: int | None) -> int:
    """Return the page size to use; None means the default of 100.

    Raises:
        InvalidRequest: It is not in 1 to 1,000.
    """
    if size is None:
        return DEFAULT_PAGE
    if not 1 <= size <= LARGEST_PAGE:
        raise InvalidRequest(
            Reason.INVALID_PARAMETER, f"page_size is {size}; use 1 to {LARGEST_PAGE}", field="page_size"
        )
    return size


def make_token(query: Sequence[str], position: str) -> str:
    """Make the token of the page after `position`.

    Args:
        query: Everything that the list depends on: method, tenant, filters.
        position: Key of the last entry sent.
    """
    packed = msgspec.msgpack.encode(_Token(_digest(query), position))
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def read_token(token: str, query: Sequence[str]) -> str | None:
    """Return the position that a token holds; None for the empty token of the first page.

    Raises:
        InvalidRequest: It is no token of this server, or of another query.
    """
    if not token:
        return None
    try:
        if len(token) > _LONGEST_TOKEN:
            raise ValueError("too long")
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        parsed = msgspec.msgpack.decode(packed, type=_Token)
    except (ValueError, binascii.Error, msgspec.MsgspecError) as error:
        raise _refused() from error
    if parsed.query != _digest(query):
        raise _refused()
    return parsed.position


def read_number(token: str, query: Sequence[str]) -> int | None:
    """As `read_token`, for positions that are revisions.

    Raises:
        InvalidRequest: As `read_token`, or the position is no revision: tokens can be forged.
    """
    position = read_token(token, query)
    if position is None:
        return None
    if not (position.isascii() and position.isdigit() and len(position) <= _MOST_DIGITS):
        raise _refused()
    return int(position)


def _digest(query: Sequence[str]) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(list(query))).digest()[:12]


def _refused() -> InvalidRequest:
    return InvalidRequest(
        Reason.INVALID_PARAMETER,
        "page_token does not belong to this list; repeat the list with the same filters from its first page",
        field="page_token",
    )
