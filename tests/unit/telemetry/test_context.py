"""Correlation ids of callers are taken only when short and plain."""

import pytest

from loramux_server.telemetry.context import correlation_id_from


@pytest.mark.parametrize("given", ["a", "req-1", "0af7651916cd43dd8448eb211c80319c", "x" * 128, "a/b:c=d@e+f.g_h"])
def test_plain_ids_are_kept(given: str) -> None:
    assert correlation_id_from(given) == given


@pytest.mark.parametrize("given", [None, "", b"bytes", "x" * 129, "a b", "a\nb", "ä", 'a"b', "{}"])
def test_others_are_replaced(given: str | bytes | None) -> None:
    minted = correlation_id_from(given)
    assert minted != given and len(minted) == 32 and minted != correlation_id_from(given)
