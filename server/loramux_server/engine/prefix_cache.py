"""Prefix cache: which page holds the KV of which full page of tokens, under which key.

Keys are a BLAKE2b chain: `key[i] = H(key[i - 1], tokens of page i)` from a *root* that commits to everything else KV
depends on: the tenant's secret salt, the adapter version's digest (or the base) and the base fingerprint. Fields are
typed and length-prefixed, so no salt can be mistaken for a digest and no two roots collide by concatenation. Equal keys
mean equal KV; tenants, adapters and versions never share any.
"""

import hashlib
import struct
from array import array
from collections.abc import Sequence

from loramux_server.engine.pages import PagePool

_KEY_BYTES = 32
_FIELD = struct.Struct(">BQ")
_TYPE_FINGERPRINT = 1
_TYPE_SALT = 2
_TYPE_BASE = 3
_TYPE_ADAPTER = 4


def root_key(*, fingerprint: str, salt: bytes, digest: str) -> bytes:
    """Root of a chain.

    Args:
        fingerprint: Base fingerprint.
        salt: The tenant's secret salt.
        digest: Digest of the adapter version; "" = the base model.
    """
    adapter = (_TYPE_ADAPTER, digest.encode()) if digest else (_TYPE_BASE, b"")
    hasher = hashlib.blake2b(digest_size=_KEY_BYTES, person=b"loramux.kv.root")
    for kind, value in ((_TYPE_FINGERPRINT, fingerprint.encode()), (_TYPE_SALT, salt), adapter):
        hasher.update(_FIELD.pack(kind, len(value)))
        hasher.update(value)
    return hasher.digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the full page `token_ids` that follows `parent`."""
    hasher = hashlib.blake2b(parent, digest_size=_KEY_BYTES, person=b"loramux.kv.page")
    hasher.update(array("q", token_ids).tobytes())
    return hasher.digest()


class PrefixCache:
    """Map from page keys to pages of a `PagePool`.

    Entries are grouped by an opaque owner (the adapter version) so that all of an owner's KV can be forgotten at once.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._entry_of: dict[int, tuple[bytes, str]] = {}
        self._pages_of_owner: dict[str, set[int]] = {}
        pool.on_evict = self._remove

    def __len__(self) -> int:
        """Number of cached pages, used and idle."""
        return len(self._entry_of)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest known prefix of the chain `keys`, one reference taken on each."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            self._pool.retain(page)
        return pages

    def count_idle(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """Pages that `match` would return and how many of them are idle, without taking them."""
        matched = idle = 0
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            matched += 1
            idle += self._pool.references(page) == 0
        return matched, idle

    def insert(self, key: bytes, page: int, *, owner: str) -> None:
        """Enter a page whose KV is complete. A key that is known already keeps its first page."""
        if key in self._page_of or page in self._entry_of:
            return
        self._pool.cache(page)
        self._page_of[key] = page
        self._entry_of[page] = (key, owner)
        self._pages_of_owner.setdefault(owner, set()).add(page)

    def forget(self, page: int) -> None:
        """Remove a page if it is cached; sequences that use it keep it until they end."""
        if page in self._entry_of:
            self._remove(page)
            self._pool.uncache(page)

    def forget_owner(self, owner: str) -> None:
        """Remove every page of an owner."""
        for page in sorted(self._pages_of_owner.get(owner, ())):
            self.forget(page)

    def _remove(self, page: int) -> None:
        key, owner = self._entry_of.pop(page)
        del self._page_of[key]
        pages = self._pages_of_owner[owner]
        pages.discard(page)
        if not pages:
            del self._pages_of_owner[owner]

    def check_integrity(self) -> None:
        """Assert that the maps agree with each other and with the pool."""
        assert {page: key for key, page in self._page_of.items()} == {p: e[0] for p, e in self._entry_of.items()}
        owned = {page: owner for owner, pages in self._pages_of_owner.items() for page in pages}
        assert owned == {page: entry[1] for page, entry in self._entry_of.items()}
        assert set(self._entry_of) == self._pool.cached_pages()
