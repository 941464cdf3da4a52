"""A registry on a clock that stands still, its integrity checked at the end."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_server.tenancy.registry import Registry
from tests.support.registry_terms import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    made = Registry(tmp_path / "registry.sqlite", clock=clock)
    yield made
    made.check_integrity()
    made.close()
