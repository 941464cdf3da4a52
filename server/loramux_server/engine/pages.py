"""Page numbers of the paged KV cache: reference counts, the free list and idle cached pages.

A page is in exactly one of three states:

- *free*: nobody refers to it and nothing useful is in it;
- *used*: one or more sequences refer to it (a prefix page may have many);
- *idle*: nobody refers to it, but the prefix cache knows its contents; it is evicted, least recently used first, when
  the free list is empty.

Page 0 is the trash page, where padding writes; it is never handed out.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PagePool:
    """Allocator of KV pages.

    Args:
        num_pages: Pages including page 0.
        track_freed: Record freed pages for `take_freed` (NaN poisoning).
    """

    def __init__(self, num_pages: int, *, track_freed: bool = False) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages: {num_pages} leaves no usable page; at least 2 are needed")
        self.num_pages = num_pages
        self.on_evict: Callable[[int], None] | None = None
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._cached: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._track_freed = track_freed
        self._freed: list[int] = []

    @property
    def usable(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now, idle cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Pages that sequences refer to."""
        return self.usable - self.available

    @property
    def idle(self) -> int:
        """Unreferenced pages that the prefix cache keeps."""
        return len(self._idle)

    def references(self, page: int) -> int:
        """Number of sequences that refer to the page."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages with one reference each; evicts idle cached pages when the free list runs out.

        The caller has checked `available`.
        """
        assert 0 <= count <= self.available, f"{count} pages asked, {self.available} available"
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self._cached.discard(page)
            if self.on_evict is not None:
                self.on_evict(page)
            self._to_free_list(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def retain(self, page: int) -> None:
        """Add a reference to a used or idle page."""
        assert self._references[page] > 0 or page in self._idle, f"page {page} is free"
        self._idle.pop(page, None)
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page.

        Pages go in the order given: pass a sequence's pages last first, so that the end of a cached prefix is evicted
        before its beginning.
        """
        for page in pages:
            assert self._references[page] > 0, f"page {page} released more often than taken"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._cached:
                    self._idle[page] = None
                else:
                    self._to_free_list(page)

    def cache(self, page: int) -> None:
        """Mark a used page as known to the prefix cache: it becomes idle instead of free."""
        assert self._references[page] > 0, f"page {page} enters the cache unreferenced"
        self._cached.add(page)

    def uncache(self, page: int) -> None:
        """The prefix cache forgot the page."""
        self._cached.discard(page)
        if page in self._idle:
            del self._idle[page]
            self._to_free_list(page)

    def cached_pages(self) -> frozenset[int]:
        """Pages that the prefix cache knows, used and idle."""
        return frozenset(self._cached)

    def take_freed(self) -> list[int]:
        """Pages freed since the last call, in order; some may have been handed out again but not written yet."""
        freed, self._freed = self._freed, []
        return freed

    def _to_free_list(self, page: int) -> None:
        self._free.append(page)
        if self._track_freed:
            self._freed.append(page)

    def check_integrity(self) -> None:
        """Assert that every page is in exactly one state."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice on the free list"
        assert 0 not in free and 0 not in self._idle and self._references[0] == 0, "page 0 was handed out"
        assert set(self._idle) <= self._cached, "an idle page is unknown to the cache"
        for page in range(1, self.num_pages):
            states = (page in free) + (page in self._idle) + (self._references[page] > 0)
            assert states == 1, f"page {page} is in {states} states"
            assert page not in free or page not in self._cached, f"cached page {page} is free"
