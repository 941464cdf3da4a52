import pytest

from loramux_server.engine import frames
from loramux_server.engine.frames import FrameDecoder, FrameError, encode_frame
from loramux_server.engine.messages import (
    Abort,
    Add,
    CommandFrame,
    EventFrame,
    Ping,
    SamplingSpec,
    Shutdown,
    TokenLogprob,
    Tokens,
)

COMMANDS = CommandFrame(
    commands=[
        Add(
            request_id="r",
            prompt_token_ids=[1, 2],
            sampling=SamplingSpec(max_tokens=3, logit_bias={5: -1.5}, seed=2**64 - 1),
            salt=b"\x00\xff",
        ),
        Abort(request_id="r"),
        Ping(),
        Shutdown(),
    ]
)
EVENTS = EventFrame(
    epoch=1,
    step=2,
    events=[
        Tokens(request_id="r", index=0, first=0, token_ids=[7], logprobs=[TokenLogprob(logprob=-0.5, top=[(7, -0.5)])])
    ],
)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_frames_survive_any_fragmentation(size: int) -> None:
    data = encode_frame(COMMANDS) * 3
    decoder: FrameDecoder[CommandFrame] = FrameDecoder(CommandFrame)
    out = [frame for begin in range(0, len(data), size) for frame in decoder.feed(data[begin : begin + size])]
    assert out == [COMMANDS] * 3


def test_events_round_trip() -> None:
    decoder: FrameDecoder[EventFrame] = FrameDecoder(EventFrame)
    assert decoder.feed(encode_frame(EVENTS)) == [EVENTS]


def test_a_length_out_of_bounds_is_refused_before_the_body_arrives() -> None:
    with pytest.raises(FrameError, match="exceeds"):
        FrameDecoder(CommandFrame).feed(b"\xff\xff\xff\xff")


def test_a_body_that_is_no_frame_is_refused() -> None:
    with pytest.raises(FrameError, match="cannot be read"):
        FrameDecoder(CommandFrame).feed(b"\x00\x00\x00\x01\xc1")
    with pytest.raises(FrameError, match="cannot be read"):
        FrameDecoder(CommandFrame).feed(encode_frame(EVENTS))


def test_a_frame_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 10)
    with pytest.raises(FrameError, match="exceeds 10"):
        encode_frame(COMMANDS)
