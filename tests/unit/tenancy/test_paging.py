import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.errors import InvalidRequest
from loramux_server.tenancy.paging import check_page_size, make_token, read_number, read_token

QUERY = ("ListAdapters", "default", "")


@given(st.text(max_size=63), st.lists(st.text(max_size=20), max_size=5))
def test_a_token_gives_its_position_back(position: str, query: list[str]) -> None:
    assert read_token(make_token(query, position), query) == position


@given(st.text(max_size=60))
def test_any_other_text_is_refused_or_empty(token: str) -> None:
    if not token:
        assert read_token(token, QUERY) is None
        return
    with pytest.raises(InvalidRequest):
        read_token(token, QUERY)


@pytest.mark.parametrize("query", [("ListAdapters", "acme", ""), ("ListAdapters", "default", "a"), ("ListAdapters",)])
def test_a_token_of_another_query_is_refused(query: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="same filters"):
        read_token(make_token(QUERY, "x"), query)


def test_a_long_token_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        read_token("A" * 100_000, QUERY)


@pytest.mark.parametrize("position", ["", "x", "-1", "1e3", "\u0663", "9" * 19, "0x1", "1_0"])
def test_a_forged_number_is_refused(position: str) -> None:
    assert read_number(make_token(QUERY, "17"), QUERY) == 17
    assert read_number("", QUERY) is None
    with pytest.raises(InvalidRequest):
        read_number(make_token(QUERY, position), QUERY)


def test_page_sizes() -> None:
    assert check_page_size(None) == 100
    assert check_page_size(1) == 1 and check_page_size(1000) == 1000
    for size in (0, 1001, 2**32 - 1):
        with pytest.raises(InvalidRequest):
            check_page_size(size)
