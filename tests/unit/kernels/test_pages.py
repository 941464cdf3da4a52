"""Page copies and poisoning."""

import pytest
import torch

from loramux_server.engine.plan import PageCopy
from loramux_server.kernels.pages import copy_pages, poison


def caches() -> list[torch.Tensor]:
    """Two layers whose elements all differ."""
    torch.manual_seed(0)
    return [torch.randn(6, 2, 4, 3, 5) for _ in range(2)]


def test_copies_the_prefix_only() -> None:
    kv = caches()
    before = [layer.clone() for layer in kv]
    copy_pages([PageCopy(source=2, target=5, tokens=3), PageCopy(source=2, target=1, tokens=1)], kv)
    for layer, old in zip(kv, before, strict=True):
        assert torch.equal(layer[5, :, :3], old[2, :, :3])
        assert torch.equal(layer[1, :, :1], old[2, :, :1])
        layer[5, :, :3], layer[1, :, :1] = old[5, :, :3], old[1, :, :1]
        assert torch.equal(layer, old)


def test_chained_copies_take_effect_in_order() -> None:
    kv = caches()
    before = [layer.clone() for layer in kv]
    copy_pages([PageCopy(source=1, target=2, tokens=4), PageCopy(source=2, target=3, tokens=4)], kv)
    for layer, old in zip(kv, before, strict=True):
        assert torch.equal(layer[3], old[1])


def test_nothing_to_copy() -> None:
    kv = caches()
    before = [layer.clone() for layer in kv]
    copy_pages([], kv)
    copy_pages([PageCopy(source=1, target=2, tokens=0)], kv)
    poison([], kv)
    assert all(torch.equal(layer, old) for layer, old in zip(kv, before, strict=True))


def test_copy_past_the_page_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens: 5 positions asked of a page of 4"):
        copy_pages([PageCopy(source=1, target=2, tokens=5)], caches())


def test_poison_fills_the_named_pages() -> None:
    kv = caches()
    poison([1, 4], kv)
    for layer in kv:
        assert layer.isnan().flatten(1).all(1).tolist() == [False, True, False, False, True, False]
        assert not layer[[0, 2, 3, 5]].isnan().any()
