"""Tests that need a CUDA device. All are skipped, with that reason, where there is none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here; skip it without a CUDA device."""
    for item in items:
        if "gpu" not in item.path.parts:
            continue
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
