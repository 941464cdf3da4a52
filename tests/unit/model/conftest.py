"""Tiny checkpoints, one a family, made once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp("base") / family, family)
        return made[family]

    return get
