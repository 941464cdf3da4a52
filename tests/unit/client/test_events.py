"""Folding of a stream into deltas, a result or an error."""

import pytest

from loramux import (
    Cancelled,
    ClientStateError,
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    MatchedStop,
    Overloaded,
    StreamInterrupted,
    ToolCall,
    Unavailable,
    Usage,
)
from loramux._events import GenerationFold
from loramux.v1 import generation_pb2 as pb


def event(**values: object) -> pb.GenerateResponse:
    return pb.GenerateResponse(**values)  # type: ignore[arg-type]


STARTED = event(started=pb.Started(generation_id="g", replica_id="r", prompt_tokens=2, seed=9))
USAGE = event(usage=pb.Usage(prompt_tokens=2, cached_tokens=1, output_tokens=3))


def delta(text: str, ids: list[int], index: int = 0) -> pb.GenerateResponse:
    return event(delta=pb.Delta(index=index, text=text, token_ids=ids))


def finished(index: int = 0, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP) -> pb.GenerateResponse:
    return event(finished=pb.Finished(index=index, reason=reason))


def test_a_huge_n_costs_nothing_before_the_server_has_seen_it() -> None:
    fold = GenerationFold(2**32 - 1)
    assert fold.sequences == 2**32 - 1 and not fold.complete
    assert fold.failed(None).outputs == ()  # type: ignore[attr-defined]


def test_sequences_that_broke_before_their_first_piece_are_told() -> None:
    fold = GenerationFold(2)
    fold.apply(STARTED)
    fold.apply(delta("He", [1, 2]))
    broken = fold.failed(None)
    assert isinstance(broken, StreamInterrupted)
    assert [(output.index, output.text) for output in broken.outputs] == [(0, "He"), (1, "")]


def test_one_sequence() -> None:
    fold = GenerationFold(1)
    assert fold.apply(STARTED) is None
    piece = fold.apply(delta("He", [1, 2]))
    assert piece is not None and (piece.text, piece.token_ids, piece.index) == ("He", (1, 2), 0)
    fold.apply(delta("y", [3]))
    with pytest.raises(ClientStateError, match="not ended"):
        fold.result()
    end = pb.Finished(reason=pb.FINISH_REASON_STOP, matched_stop=pb.MatchedStop(stop="!"))
    fold.apply(event(finished=end))
    assert not fold.complete
    fold.apply(USAGE)
    assert fold.complete
    result = fold.result()
    assert (result.text, result.token_ids, result.finish_reason) == ("Hey", (1, 2, 3), FinishReason.STOP)
    assert result.outputs[0].matched_stop == MatchedStop(stop="!")
    assert result.usage == Usage(prompt_tokens=2, cached_tokens=1, output_tokens=3)
    assert (result.generation_id, result.adapter_version, result.started.seed) == ("g", None, 9)


def test_sequences_are_told_apart() -> None:
    fold = GenerationFold(2)
    for message in (STARTED, delta("a", [1]), delta("x", [7], 1), delta("b", [2]), finished(1), finished(0), USAGE):
        assert not fold.complete
        fold.apply(message)
    assert [output.text for output in fold.result().outputs] == ["ab", "x"]
    assert [end.index for end in fold.finished] == [0, 1]
    with pytest.raises(InvalidRequest, match=r"outputs\[i\]\.text"):
        _ = fold.result().text


def test_a_missing_sequence_is_no_result() -> None:
    fold = GenerationFold(2)
    for message in (STARTED, delta("a", [1]), finished(0), USAGE):
        fold.apply(message)
    assert not fold.complete
    error = fold.failed(None)
    assert isinstance(error, StreamInterrupted)
    assert [output.finish_reason for output in error.outputs] == [FinishReason.STOP, FinishReason.INTERRUPTED]


def test_unknown_events_and_reasons_are_accepted() -> None:
    fold = GenerationFold(1)
    assert fold.apply(pb.GenerateResponse()) is None
    fold.apply(finished(reason=77))  # type: ignore[arg-type]
    assert fold.finished[0].reason is FinishReason.UNKNOWN


def test_logprobs_reasoning_and_tool_calls() -> None:
    fold = GenerationFold(1)
    fold.apply(STARTED)
    prompt = [pb.PositionLogprobs(token=pb.TokenLogprob(token_id=4))]
    fold.apply(event(prompt_logprobs=pb.PromptLogprobs(positions=prompt)))
    top = [pb.TokenLogprob(token_id=1, logprob=-0.5, token_bytes=b"a")]
    piece = pb.Delta(
        token_ids=[1],
        reasoning_text="hm",
        logprobs=[pb.PositionLogprobs(token=top[0], top=top)],
        tool_calls=[pb.ToolCallDelta(index=0, id="c", name="add", arguments_json='{"a":')],
    )
    fold.apply(event(delta=piece))
    more = [pb.ToolCallDelta(index=0, arguments_json=" 1}"), pb.ToolCallDelta(index=1, id="d", name="sub")]
    fold.apply(event(delta=pb.Delta(tool_calls=more)))
    fold.apply(finished(reason=pb.FINISH_REASON_TOOL_CALLS))
    fold.apply(USAGE)
    result = fold.result()
    assert result.prompt_logprobs[0].token.logprob is None
    output = result.outputs[0]
    assert output.reasoning_text == "hm"
    assert output.logprobs[0].top[0].token_bytes == b"a"
    assert output.tool_calls == (
        ToolCall(id="c", name="add", arguments_json='{"a": 1}'),
        ToolCall(id="d", name="sub", arguments_json=""),
    )


class TestFailures:
    def test_before_started_the_error_is_the_servers(self) -> None:
        cause = Unavailable("away")
        assert GenerationFold(1).failed(cause) is cause

    def test_a_broken_stream_has_what_arrived(self) -> None:
        fold = GenerationFold(1)
        for message in (STARTED, delta("He", [1, 2])):
            fold.apply(message)
        error = fold.failed(Unavailable("gone", request_id="r1", retry_after=2.0))
        assert isinstance(error, StreamInterrupted)
        assert (error.partial, error.tokens_received, error.generation_id) == ("He", 2, "g")
        assert (error.code, error.request_id, error.retry_after) == ("UNAVAILABLE", "r1", 2.0)

    @pytest.mark.parametrize("cause", [DeadlineExceeded("late"), Overloaded("slow", reason="SLOW_READER")])
    def test_a_verdict_keeps_its_class(self, cause: DeadlineExceeded | Overloaded) -> None:
        fold = GenerationFold(1)
        fold.apply(STARTED)
        assert fold.failed(cause) is cause
        assert cause.generation_id == "g"

    def test_a_call_cancelled_by_others_is_an_interruption(self) -> None:
        fold = GenerationFold(1)
        fold.apply(STARTED)
        assert isinstance(fold.failed(Cancelled("by a proxy")), StreamInterrupted)
