import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.text.stop import StopMatch, StopMatcher


def naive(text: str, stops: list[str]) -> tuple[int, str] | None:
    """End of the first stop string that is complete, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


LETTERS = st.text(alphabet="ab\u4f60", min_size=1, max_size=6)


@settings(max_examples=600, deadline=None)
@given(
    tokens=st.lists(st.text(alphabet="ab\u4f60", max_size=4), max_size=20),
    stops=st.lists(LETTERS, max_size=5),
    include=st.booleans(),
)
def test_equals_naive_search(tokens: list[str], stops: list[str], include: bool) -> None:
    text = "".join(tokens)
    wanted = naive(text, stops)
    matcher = StopMatcher(stops, include)
    emitted, match, seen = "", None, ""
    for count, token in enumerate(tokens, 1):
        emit, match = matcher.push(token, count)
        emitted += emit
        seen += token
        if match:
            break
        # Held back is exactly the longest end of the text that begins a stop string.
        begins = [n for n in range(len(seen) + 1) if any(stop.startswith(seen[len(seen) - n :]) for stop in stops)]
        assert matcher.held == (seen[len(seen) - max(begins) :] if begins and max(begins) else "")
        assert emitted + matcher.held == seen
    emitted += matcher.flush()
    if wanted is None:
        assert match is None
        assert emitted == text
        return
    end, stop = wanted
    assert emitted == text[: end if include else end - len(stop)]
    lengths = [sum(map(len, tokens[:count])) for count in range(len(tokens) + 1)]
    assert match == StopMatch(stop=stop, token_count=next(n for n, length in enumerate(lengths) if length >= end))


@settings(max_examples=100, deadline=None)
@given(text=LETTERS, stops=st.lists(LETTERS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_cuts_change_nothing(text: str, stops: list[str], seed: int) -> None:
    text = text * 4
    rng = random.Random(seed)
    results = set()
    for _ in range(4):
        matcher = StopMatcher(stops)
        emitted, rest, match = "", text, None
        while rest and match is None:
            size = rng.randint(1, 5)
            emit, match = matcher.push(rest[:size], 0)
            emitted, rest = emitted + emit, rest[size:]
        results.add((emitted + matcher.flush(), match))
    assert len(results) == 1
