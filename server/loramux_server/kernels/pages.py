"""Whole-page work on the KV cache outside the forward pass: copy-on-write copies and poisoning.

`kv` is the list of layers' caches, each `[pages, 2, page, Hkv, D]`. Both operations run a few tensor operations a layer
on whatever device the cache lives on; they happen on forks and frees, not in every step.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class PageCopyLike(Protocol):
    """One copy: the first `tokens` positions of page `source` to page `target`."""

    @property
    def source(self) -> int:
        """Page read."""

    @property
    def target(self) -> int:
        """Page written."""

    @property
    def tokens(self) -> int:
        """Positions copied, counted from the start of the page."""


def copy_pages(copies: Iterable[PageCopyLike], kv: Sequence[Tensor]) -> None:
    """Copy page prefixes in every layer; positions past `tokens` of a target keep their contents.

    Copies take effect in order: a source that an earlier copy wrote is read with the new contents.

    Args:
        copies: Copies to make; may be empty.
        kv: Cache of each layer, written in place.

    Raises:
        ValueError: A copy names more positions than a page has.
    """
    pending: list[PageCopyLike] = []
    written: set[int] = set()
    for copy in copies:
        if kv and not 0 <= copy.tokens <= kv[0].shape[2]:
            raise ValueError(f"tokens: {copy.tokens} positions asked of a page of {kv[0].shape[2]}")
        if copy.source in written or copy.target in written:
            _copy_independent(pending, kv)
            pending, written = [], set()
        pending.append(copy)
        written.add(copy.target)
    _copy_independent(pending, kv)


def poison(pages: Iterable[int], kv: Sequence[Tensor]) -> None:
    """Fill pages with NaN in every layer, so that any read of a freed page shows.

    Args:
        pages: Page numbers; may be empty.
        kv: Cache of each layer, written in place.
    """
    numbers = list(pages)
    if not numbers or not kv:
        return
    index = _send(numbers, kv[0])
    for layer in kv:
        layer.index_fill_(0, index, float("nan"))


def _send(values: Sequence[int] | Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """int64 values where `like` lives; from pinned memory, so that the host does not wait for the steps before."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)


def _copy_independent(copies: Sequence[PageCopyLike], kv: Sequence[Tensor]) -> None:
    """Run copies none of which reads or writes a page that another one writes."""
    if not copies or not kv:
        return
    page_size = kv[0].shape[2]
    rows: list[tuple[int, int]] = [
        ((2 * copy.source + part) * page_size + i, (2 * copy.target + part) * page_size + i)
        for copy in copies
        for part in (0, 1)
        for i in range(copy.tokens)
    ]
    if not rows:
        return
    source, target = _send(rows, kv[0]).t().contiguous()
    for layer in kv:
        flat = layer.view(-1, layer.shape[3], layer.shape[4])
        flat.index_copy_(0, target, flat.index_select(0, source))
