import itertools

import pytest

from loramux_server.engine.pages import PagePool
from loramux_server.engine.prefix_cache import PrefixCache, page_key, root_key


def test_roots_differ_in_every_field_and_never_by_concatenation() -> None:
    roots = [
        root_key(fingerprint=fingerprint, salt=salt, digest=digest)
        for fingerprint, salt, digest in [
            ("f", b"s", ""),
            ("f", b"s", "d"),
            ("f", b"t", ""),
            ("f", b"", ""),
            ("g", b"s", ""),
            ("f", b"d", ""),
            ("f", b"", "d"),
            ("f", b"sd", ""),
            ("fs", b"", "d"),
            ("", b"fs", "d"),
            ("f", b"\x04", "d"),
        ]
    ]
    assert len(set(roots)) == len(roots)


def test_page_keys_depend_on_everything_before() -> None:
    root = root_key(fingerprint="f", salt=b"s", digest="d")
    chains = [
        page_key(page_key(root, first), second)
        for first, second in itertools.product([[1, 2], [2, 1]], [[3, 4], [4, 3]])
    ]
    assert len(set(chains)) == 4
    assert page_key(root, [1, 2]) == page_key(root, (1, 2))


class TestCache:
    def setup_method(self) -> None:
        self.pool = PagePool(8)
        self.cache = PrefixCache(self.pool)

    def enter(self, keys: list[bytes], owner: str = "v") -> list[int]:
        pages = self.pool.allocate(len(keys))
        for key, page in zip(keys, pages, strict=True):
            self.cache.insert(key, page, owner=owner)
        return pages

    def test_match_is_the_longest_known_prefix_and_takes_references(self) -> None:
        pages = self.enter([b"1", b"2", b"3"])
        self.pool.release(reversed(pages))
        assert self.cache.count_idle([b"1", b"2", b"x", b"3"]) == (2, 2)
        assert self.cache.match([b"1", b"2", b"x", b"3"]) == pages[:2]
        assert [self.pool.references(page) for page in pages] == [1, 1, 0]
        assert self.cache.count_idle([b"1", b"2", b"3"]) == (3, 1)
        self.cache.check_integrity()

    def test_a_known_key_keeps_its_first_page(self) -> None:
        [first] = self.enter([b"1"])
        [second] = self.pool.allocate(1)
        self.cache.insert(b"1", second, owner="v")
        self.pool.release([second])
        assert self.pool.idle == 0
        assert self.cache.match([b"1"]) == [first]

    def test_eviction_removes_the_entry(self) -> None:
        self.pool.release(self.enter([b"1"]))
        self.pool.allocate(self.pool.available)
        assert self.cache.match([b"1"]) == [] and len(self.cache) == 0
        self.cache.check_integrity()

    def test_forgetting_an_owner_spares_others_and_pages_in_use(self) -> None:
        used, idle = self.enter([b"1", b"2"], owner="v")
        self.enter([b"3"], owner="w")
        self.pool.release([idle])
        self.cache.forget_owner("v")
        assert self.cache.match([b"1"]) == [] and self.cache.match([b"2"]) == []
        assert len(self.cache.match([b"3"])) == 1
        assert self.pool.references(used) == 1 and self.pool.references(idle) == 0
        self.pool.release([used])
        assert self.pool.idle == 0
        self.pool.check_integrity()
        self.cache.check_integrity()

    def test_integrity_check_finds_a_lost_entry(self) -> None:
        self.enter([b"1"])
        self.cache._page_of.clear()
        with pytest.raises(AssertionError):
            self.cache.check_integrity()
