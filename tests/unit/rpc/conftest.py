"""The adapter service, its table's integrity checked at the end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.adapter_calls import Served


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path)
    await made.cycle.start()
    yield made
    made.cycle.table.check_integrity()
    await made.cycle.close()
