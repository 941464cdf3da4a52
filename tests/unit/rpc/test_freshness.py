import asyncio

import pytest

from loramux_server.errors import InvalidRequest, Unavailable
from loramux_server.rpc.freshness import Freshness


class Revisions:
    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.asked: list[tuple[int, float]] = []

    async def reaches(self, revision: int, seconds: float) -> bool:
        self.asked.append((revision, seconds))
        await asyncio.sleep(0)
        return self.revision >= revision


async def test_a_call_without_the_metadata_does_not_wait() -> None:
    revisions = Revisions(7)
    await Freshness(revisions).check({"x-request-id": "1"})
    assert revisions.asked == []


@pytest.mark.parametrize("text", ["0", "7", "007"])
async def test_a_revision_that_was_seen_passes(text: str) -> None:
    revisions = Revisions(7)
    await Freshness(revisions, seconds=3.0).check({"min_revision": text})
    assert revisions.asked == [(int(text), 3.0)]


async def test_a_revision_that_does_not_come_can_be_retried() -> None:
    with pytest.raises(Unavailable, match="is 8, and this replica has seen revision 7") as caught:
        await Freshness(Revisions(7)).check({"min_revision": "8"})
    assert caught.value.retry_after == 1.0 and caught.value.metadata == {"revision": "7"}


@pytest.mark.parametrize("text", ["", "-1", "x", "1.0", "٣", "18446744073709551616", "9" * 4000])
async def test_no_number_is_invalid(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Freshness(Revisions(7)).check({"min_revision": text})
    assert caught.value.field == "min_revision" and len(caught.value.message) < 300
