"""Stop strings over streamed text."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """The stop string that ended a sequence.

    Attributes:
        stop: The string.
        token_count: The count given with the text that completed it: tokens up to and with the one that did.
    """

    stop: str
    token_count: int


class StopMatcher:
    """Finds the first stop string and holds back text that may begin one.

    The match is the stop string that is complete first, character by character, and the longest of those that are
    complete at the same character; how the text is cut into pushes changes nothing. Time is linear in the text
    (Aho-Corasick), memory in the stop strings; the caller bounds them. Text held back is always shorter than the
    longest stop string.

    For an exact token index push the text of one token at a time; the match then carries that token's count.

    Args:
        stops: Non-empty strings; duplicates are fine.
        include_stop: Whether the matched string is part of the emitted text.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if not all(stops):
            raise ValueError("stop strings must not be empty")
        self._include_stop = include_stop
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0
        self._held = ""
        self._finished = False

    @property
    def held(self) -> str:
        """Text that was pushed and not emitted yet."""
        return self._held

    def push(self, text: str, token_count: int) -> tuple[str, StopMatch | None]:
        """Take the next text.

        Args:
            text: Text that follows what was pushed before; may be empty.
            token_count: Tokens of the sequence so far, those of `text` included.

        Returns:
            The text to emit now, and the match if there is one; after it nothing more may be pushed.
        """
        assert not self._finished, "text pushed after the match or the flush"
        state = self._state
        for index, char in enumerate(text):
            while state and char not in self._next[state]:
                state = self._fail[state]
            state = self._next[state].get(char, 0)
            stop = self._match[state]
            if stop is not None:
                self._finished = True
                emit = self._held + text[: index + 1]
                self._held = ""
                if not self._include_stop:
                    emit = emit[: -len(stop)]
                return emit, StopMatch(stop=stop, token_count=token_count)
        self._state = state
        pending = self._held + text
        cut = len(pending) - self._depth[state]
        self._held = pending[cut:]
        return pending[:cut], None

    def flush(self) -> str:
        """The text held back, once no more follows; empty after a match."""
        self._finished = True
        held, self._held = self._held, ""
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._next[state].get(char)
            if following is None:
                following = len(self._next)
                self._next[state][char] = following
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(None)
            state = following
        self._match[state] = stop

    def _link(self) -> None:
        """Set, breadth first, each state's longest proper suffix that is a state too."""
        queue = list(self._next[0].values())
        for state in queue:
            for char, following in self._next[state].items():
                fail = self._fail[state]
                while fail and char not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[following] = self._next[fail].get(char, 0)
                queue.append(following)
            if self._match[state] is None:
                self._match[state] = self._match[self._fail[state]]
