import pytest

from loramux_server.engine import event_buffer
from loramux_server.engine.event_buffer import EventBuffer
from loramux_server.engine.messages import Done, Event, SequenceFinished, TokenLogprob, Tokens


def tokens(request_id: str, first: int, *token_ids: int, index: int = 0, logprobs: bool = False) -> Tokens:
    return Tokens(
        request_id=request_id,
        index=index,
        first=first,
        token_ids=list(token_ids),
        logprobs=[TokenLogprob(logprob=-float(token)) for token in token_ids] if logprobs else [],
    )


def test_waiting_tokens_of_a_sequence_are_merged_and_ends_stay_behind_them() -> None:
    buffer = EventBuffer()
    end = SequenceFinished(request_id="r", index=0, reason="length", stop_token_id=None, tokens=3)
    done = Done(request_id="r", status="finished")
    buffer.push([tokens("r", 0, 1), tokens("q", 0, 9)])
    buffer.push([tokens("r", 1, 2, logprobs=False), tokens("r", 0, 5, index=1)])
    buffer.push([tokens("r", 2, 3), end, tokens("q", 1, 8), done])
    assert buffer.pop_frame() == [
        tokens("r", 0, 1, 2, 3),
        tokens("q", 0, 9, 8),
        tokens("r", 0, 5, index=1),
        end,
        done,
    ]
    assert not buffer and buffer.units == 0


def test_logprobs_stay_with_their_tokens() -> None:
    buffer = EventBuffer()
    buffer.push([tokens("r", 4, 1, logprobs=True)])
    buffer.push([tokens("r", 5, 2, 3, logprobs=True)])
    assert buffer.pop_frame() == [tokens("r", 4, 1, 2, 3, logprobs=True)]


def test_a_new_frame_starts_new_tokens() -> None:
    buffer = EventBuffer()
    buffer.push([tokens("r", 0, 1)])
    assert buffer.pop_frame() == [tokens("r", 0, 1)]
    buffer.push([tokens("r", 1, 2)])
    assert buffer.pop_frame() == [tokens("r", 1, 2)]


def test_a_long_backlog_becomes_several_frames_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_buffer, "_FRAME_UNITS", 10)
    buffer = EventBuffer()
    events: list[Event] = [tokens(f"r{number}", 0, 1, 2, 3) for number in range(10)]
    buffer.push(events)
    frames = []
    while buffer:
        frames.append(buffer.pop_frame())
    assert len(frames) > 2 and [event for frame in frames for event in frame] == events


def test_a_gap_is_our_bug() -> None:
    buffer = EventBuffer()
    buffer.push([tokens("r", 0, 1)])
    with pytest.raises(AssertionError, match="gap"):
        buffer.push([tokens("r", 2, 1)])
