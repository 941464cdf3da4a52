import pytest

from loramux_server.text.stop import StopMatch, StopMatcher


def test_holds_back_what_may_begin_one() -> None:
    matcher = StopMatcher(["###", "END"])
    assert matcher.push("Hello #", 1) == ("Hello ", None)
    assert matcher.held == "#"
    assert matcher.push("# E", 2) == ("## ", None)
    assert matcher.push("N", 3) == ("", None)
    assert matcher.push("D and more", 4) == ("", StopMatch(stop="END", token_count=4))
    assert matcher.flush() == ""


def test_a_match_across_tokens_keeps_the_text_before() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("ok\n", 5)[0] == "ok"
    assert matcher.push("Us", 6)[0] == ""
    assert matcher.push("er:", 7) == ("", StopMatch(stop="\nUser:", token_count=7))


def test_include_stop() -> None:
    matcher = StopMatcher(["!!"], include_stop=True)
    assert matcher.push("a!", 1) == ("a", None)
    assert matcher.push("!b", 2) == ("!!", StopMatch(stop="!!", token_count=2))


def test_first_complete_wins_then_longest() -> None:
    assert StopMatcher(["abcd", "bc"]).push("xabcd", 1) == ("xa", StopMatch(stop="bc", token_count=1))
    assert StopMatcher(["c", "abc"]).push("xabc", 1) == ("x", StopMatch(stop="abc", token_count=1))


def test_flush_gives_what_was_held() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the EN", 1) == ("the ", None)
    assert matcher.flush() == "EN"


def test_no_stops_hold_nothing() -> None:
    matcher = StopMatcher([])
    assert matcher.push("anything", 1) == ("anything", None)


def test_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


def test_pushing_after_the_end_is_our_bug() -> None:
    matcher = StopMatcher(["a"])
    matcher.push("a", 1)
    with pytest.raises(AssertionError):
        matcher.push("b", 2)


def test_many_long_stops() -> None:
    stops = ["a" * 255 + chr(0x100 + number) for number in range(16)]
    matcher = StopMatcher(stops)
    emitted = "".join(matcher.push("a" * 100, count)[0] for count in range(200))
    assert len(emitted) == 200 * 100 - 255
    assert matcher.push("\u0105", 201)[1] == StopMatch(stop=stops[5], token_count=201)
