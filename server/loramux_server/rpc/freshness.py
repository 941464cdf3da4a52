"""Metadata `min_revision`: read your own writes, whichever replica answers."""

from collections.abc import Mapping
from typing import Protocol

from loramux_server.errors import InvalidRequest, Reason, Unavailable
from loramux_server.tenancy.names import echo

MIN_REVISION_METADATA = "min_revision"
WAIT_SECONDS = 2.0
_MOST_DIGITS = 20


class Revisions(Protocol):
    """The registry as this replica sees it; `lora.adapter_table.AdapterTable` is it."""

    @property
    def revision(self) -> int:
        """Newest revision that it shows."""
        ...

    async def reaches(self, revision: int, seconds: float) -> bool:
        """Wait at most so long for a revision; returns whether it is shown."""
        ...


class Freshness:
    """Holds a call back until this replica has seen the revision that the caller has.

    Args:
        revisions: What this replica has seen.
        seconds: Longest wait.
    """

    def __init__(self, revisions: Revisions, *, seconds: float = WAIT_SECONDS) -> None:
        self._revisions = revisions
        self._seconds = seconds

    async def check(self, metadata: Mapping[str, str]) -> None:
        """Wait for the revision that the metadata of a call asks for, if it asks for one.

        Raises:
            InvalidRequest: It is no unsigned 64-bit decimal number.
            Unavailable: STORE_UNAVAILABLE with RetryInfo: the revision has not come in time.
        """
        text = metadata.get(MIN_REVISION_METADATA)
        if text is None:
            return
        digits = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
        if not digits or int(text) >= 2**64:
            raise InvalidRequest(
                Reason.INVALID_PARAMETER,
                f"metadata {MIN_REVISION_METADATA} is {echo(text)}; give an unsigned 64-bit decimal number, the "
                "revision of a change",
                field=MIN_REVISION_METADATA,
            )
        wanted = int(text)
        if not await self._revisions.reaches(wanted, self._seconds):
            seen = self._revisions.revision
            raise Unavailable(
                Reason.STORE_UNAVAILABLE,
                f"metadata {MIN_REVISION_METADATA} is {wanted}, and this replica has seen revision {seen} of the "
                f"registry after {self._seconds:g} s; retry, or leave it out if no change has answered with it",
                metadata={"revision": str(seen)},
                retry_after=1.0,
            )
