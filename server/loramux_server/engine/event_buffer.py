"""Events that wait for a lagging reader: tokens of one sequence are merged, nothing is ever dropped."""

import dataclasses

from loramux_server.engine.messages import Event, TokenLogprob, Tokens

_FRAME_UNITS = 65536


@dataclasses.dataclass(slots=True)
class _Merged:
    request_id: str
    index: int
    first: int
    token_ids: list[int]
    logprobs: list[TokenLogprob]

    def freeze(self) -> Tokens:
        return Tokens(
            request_id=self.request_id,
            index=self.index,
            first=self.first,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
        )


def _units(event: Event | _Merged) -> int:
    """Rough size: one for the event, one a token, one a log-probability."""
    if isinstance(event, (Tokens, _Merged)):
        return 1 + len(event.token_ids) + sum(1 + len(entry.top) for entry in event.logprobs)
    entries = getattr(event, "entries", ())
    return 1 + sum(1 + len(entry.top) for entry in entries)


class EventBuffer:
    """Events in order of their first part; later tokens of a sequence join the ones that still wait.

    That is safe: whatever ends a sequence comes after its last token, so joining moves tokens earlier only past events
    of other sequences.
    """

    def __init__(self) -> None:
        self._events: list[Event | _Merged] = []
        self._open: dict[tuple[str, int], _Merged] = {}
        self.units = 0

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._events)

    def push(self, events: list[Event]) -> None:
        """Append a step's events."""
        for event in events:
            self.units += _units(event)
            if not isinstance(event, Tokens):
                self._events.append(event)
                continue
            merged = self._open.get((event.request_id, event.index))
            if merged is None:
                merged = _Merged(event.request_id, event.index, event.first, [], [])
                self._open[event.request_id, event.index] = merged
                self._events.append(merged)
            assert event.first == merged.first + len(merged.token_ids), "tokens of a sequence have a gap"
            merged.token_ids.extend(event.token_ids)
            merged.logprobs.extend(event.logprobs)

    def pop_frame(self) -> list[Event]:
        """Events for one frame, oldest first; bounded, so that a long backlog becomes several frames."""
        taken: list[Event] = []
        units = 0
        while len(taken) < len(self._events) and (not taken or units < _FRAME_UNITS):
            event = self._events[len(taken)]
            units += _units(event)
            if isinstance(event, _Merged):
                del self._open[event.request_id, event.index]
                taken.append(event.freeze())
            else:
                taken.append(event)
        del self._events[: len(taken)]
        self.units = sum(map(_units, self._events)) if self._events else 0
        return taken
