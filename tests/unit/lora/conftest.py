"""Upload sessions and the life of adapters, with their integrity checked at the end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.adapter_life import Life, running
from tests.support.upload_sessions import Uploads


@pytest.fixture
async def uploads(tmp_path: Path) -> AsyncIterator[Uploads]:
    made = Uploads(tmp_path)
    yield made
    made.sessions.check_integrity()
    await made.sessions.close()
    assert made.left() == []
    made.store.close()


@pytest.fixture
async def life(tmp_path: Path) -> AsyncIterator[Life]:
    async with running(tmp_path) as made:
        yield made
