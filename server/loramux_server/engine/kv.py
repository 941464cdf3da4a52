"""KV memory of sequences: pages taken, shared, forked, entered into the prefix cache and given back."""

from loramux_server.engine.pages import PagePool
from loramux_server.engine.plan import PageCopy
from loramux_server.engine.prefix_cache import PrefixCache, page_key
from loramux_server.engine.sequence import Sequence


class KvCache:
    """Pages of all sequences.

    Args:
        num_pages: Pages including page 0.
        page_size: Tokens a page.
        prefix_caching: Reuse full pages of equal prefixes.
        track_freed: Record freed pages (NaN poisoning).
    """

    def __init__(self, *, num_pages: int, page_size: int, prefix_caching: bool, track_freed: bool = False) -> None:
        self.page_size = page_size
        self.pool = PagePool(num_pages, track_freed=track_freed)
        self.prefix = PrefixCache(self.pool)
        self._prefix_caching = prefix_caching

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def worst_case(self, *, prompt: int, output: int, sequences: int) -> int:
        """Most pages a request can hold: full prompt pages are shared, the rest is each sequence's own."""
        shared = (prompt - 1) // self.page_size
        return shared + sequences * (self.pages_for(prompt + output) - shared)

    def admission_cost(self, sequence: Sequence, *, root: bytes, reusable: int) -> int:
        """Pages of `pool.available` that `admit` would use up."""
        keys = self._keys(sequence, root, reusable // self.page_size) if self._prefix_caching else []
        matched, idle = self.prefix.count_idle(keys)
        return self.pages_for(len(sequence.tokens)) - matched + idle

    def admit(self, sequence: Sequence, *, root: bytes, reusable: int) -> int:
        """Give a sequence without pages all it needs for the tokens it has.

        Args:
            sequence: Its pages and `computed` are set.
            root: Root key of its prefixes.
            reusable: Leading tokens that may come from the cache; less than all, so that something is computed.

        Returns:
            Tokens taken from the prefix cache.
        """
        assert not sequence.pages and sequence.computed == 0
        assert reusable < len(sequence.tokens)
        if self._prefix_caching:
            sequence.pages = self.prefix.match(self._keys(sequence, root, reusable // self.page_size))
            sequence.computed = len(sequence.pages) * self.page_size
        self.grow(sequence)
        return sequence.computed

    def missing(self, sequence: Sequence) -> int:
        """Pages that `grow` would take."""
        # A step that was planned behind another and then dropped may have left a page more than is needed now.
        return max(0, -(-sequence.length // self.page_size) - len(sequence.pages))

    def grow(self, sequence: Sequence) -> None:
        """Extend the pages to cover every token, the pending one too; the caller has checked `pool.available`."""
        missing = self.missing(sequence)
        if missing:
            sequence.pages.extend(self.pool.allocate(missing))

    def fork_cost(self, lead: Sequence, sequence: Sequence) -> int:
        """Pages that `fork` would take."""
        return self.pages_for(len(sequence.tokens)) - lead.computed // self.page_size

    def fork(self, lead: Sequence, sequence: Sequence) -> None:
        """Let `sequence` share the computed prefix of `lead`: full pages by reference, the partial page by a copy."""
        assert not sequence.pages and lead.computed < sequence.prompt_length
        full, partial = divmod(lead.computed, self.page_size)
        for page in lead.pages[:full]:
            self.pool.retain(page)
        sequence.pages = lead.pages[:full]
        sequence.keys = lead.keys[:full]
        sequence.computed = lead.computed
        self.grow(sequence)
        if partial:
            source = lead.pages[full]
            self.pool.retain(source)
            sequence.pending_copy = PageCopy(source=source, target=sequence.pages[full], tokens=partial)

    def committed(self, sequence: Sequence, tokens: int, *, root: bytes, owner: str) -> None:
        """The step that computed the next `tokens` tokens succeeded: full pages may enter the prefix cache."""
        before = sequence.computed // self.page_size
        sequence.computed += tokens
        if sequence.pending_copy is not None:
            self.pool.release([sequence.pending_copy.source])
            sequence.pending_copy = None
        full = sequence.computed // self.page_size
        if self._prefix_caching and full > before:
            keys = self._keys(sequence, root, full)
            for index in range(before, full):
                self.prefix.insert(keys[index], sequence.pages[index], owner=owner)

    def release(self, sequence: Sequence) -> None:
        """Give back every page; the sequence starts from nothing if it goes on."""
        if sequence.pending_copy is not None:
            self.pool.release([sequence.pending_copy.source])
            sequence.pending_copy = None
        self.pool.release(reversed(sequence.pages))
        sequence.pages = []
        sequence.computed = 0

    def distrust(self, sequence: Sequence) -> None:
        """Remove the sequence's pages from the prefix cache: its numbers went bad."""
        for page in sequence.pages:
            self.prefix.forget(page)

    def _keys(self, sequence: Sequence, root: bytes, count: int) -> list[bytes]:
        keys = sequence.keys
        while len(keys) < count:
            start = len(keys) * self.page_size
            parent = keys[-1] if keys else root
            keys.append(page_key(parent, sequence.tokens[start : start + self.page_size]))
        return keys[:count]

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Assert that reference counts are exactly those of the living sequences.

        Args:
            sequences: Every sequence that may hold pages.
        """
        self.pool.check_integrity()
        self.prefix.check_integrity()
        expected = [0] * self.pool.num_pages
        for sequence in sequences:
            for page in sequence.pages:
                expected[page] += 1
            if sequence.pending_copy is not None:
                expected[sequence.pending_copy.source] += 1
            assert sequence.computed <= len(sequence.pages) * self.page_size
            assert len(set(sequence.pages)) == len(sequence.pages), "a sequence has a page twice"
        for page in range(1, self.pool.num_pages):
            held = self.pool.references(page)
            assert held == expected[page], f"page {page} has {held} references, sequences hold {expected[page]}"
