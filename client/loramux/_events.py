"""From the messages of the generation calls to the SDK's values, and the folding of a stream into a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration

from loramux._errors import ClientStateError, LoramuxError, StreamInterrupted
from loramux._prompt_types import ToolCall
from loramux._types import (
    AdapterVersionRef,
    Delta,
    Finished,
    FinishReason,
    GenerationResult,
    MatchedStop,
    Output,
    PositionLogprobs,
    Started,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from loramux.v1 import common_pb2
from loramux.v1 import generation_pb2 as pb

_FINISH: Mapping[int, FinishReason] = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
    pb.FINISH_REASON_TIME_LIMIT: FinishReason.TIME_LIMIT,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}

# After Started these codes say only that the stream broke; every other one is a verdict and keeps its own class.
_BROKEN = frozenset({"UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED", "DATA_LOSS"})


def seconds(value: Duration) -> float:
    """Convert a duration to seconds."""
    return value.seconds + value.nanos / 1e9


def version_ref(value: common_pb2.AdapterVersionRef) -> AdapterVersionRef:
    """Convert a version reference."""
    return AdapterVersionRef(adapter=value.adapter, version=value.version, digest=value.digest, revision=value.revision)


def _started(value: pb.Started) -> Started:
    """Convert the first event."""
    return Started(
        generation_id=value.generation_id,
        adapter=version_ref(value.adapter) if value.HasField("adapter") else None,
        replica_id=value.replica_id,
        prompt_tokens=value.prompt_tokens,
        cached_tokens=value.cached_tokens,
        seed=value.seed,
        queue_time=seconds(value.queue_time),
        adapter_load_time=seconds(value.adapter_load_time),
        raw=value,
    )


def _logprob(value: pb.TokenLogprob) -> TokenLogprob:
    """Convert a token's log-probability."""
    return TokenLogprob(
        token_id=value.token_id,
        logprob=value.logprob if value.HasField("logprob") else None,
        token_bytes=value.token_bytes,
    )


def _position(value: pb.PositionLogprobs) -> PositionLogprobs:
    """Convert the log-probabilities at a position."""
    return PositionLogprobs(token=_logprob(value.token), top=tuple(_logprob(top) for top in value.top))


def _delta(value: pb.Delta) -> Delta:
    """Convert a piece of output."""
    return Delta(
        index=value.index,
        text=value.text,
        token_ids=tuple(value.token_ids),
        logprobs=tuple(_position(position) for position in value.logprobs),
        reasoning_text=value.reasoning_text,
        tool_calls=tuple(
            ToolCallDelta(
                index=call.index,
                id=call.id if call.HasField("id") else None,
                name=call.name if call.HasField("name") else None,
                arguments_json=call.arguments_json,
            )
            for call in value.tool_calls
        ),
        raw=value,
    )


def _matched(value: pb.MatchedStop) -> MatchedStop:
    """Convert what ended a sequence."""
    kind = value.WhichOneof("match")
    return MatchedStop(
        eos_token_id=value.eos_token_id if kind == "eos_token_id" else None,
        stop_token_id=value.stop_token_id if kind == "stop_token_id" else None,
        stop=value.stop if kind == "stop" else None,
    )


def _finished(value: pb.Finished) -> Finished:
    """Convert the end of a sequence."""
    return Finished(
        index=value.index,
        reason=_FINISH.get(value.reason, FinishReason.UNKNOWN),
        matched_stop=_matched(value.matched_stop) if value.HasField("matched_stop") else None,
        raw=value,
    )


@dataclass(slots=True)
class _ToolCall:
    """A tool call that is being put together."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Sequence:
    """A sequence that is being put together."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: dict[int, _ToolCall] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        """Append a piece."""
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.reasoning.append(delta.reasoning_text)
        for piece in delta.tool_calls:
            call = self.tool_calls.setdefault(piece.index, _ToolCall())
            call.id = call.id or piece.id or ""
            call.name = call.name or piece.name or ""
            call.arguments.append(piece.arguments_json)

    def output(self, index: int, finished: Finished | None) -> Output:
        """Return what there is."""
        return Output(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            finish_reason=FinishReason.INTERRUPTED if finished is None else finished.reason,
            matched_stop=None if finished is None else finished.matched_stop,
            logprobs=tuple(self.logprobs),
            reasoning_text="".join(self.reasoning),
            tool_calls=tuple(
                ToolCall(id=call.id, name=call.name, arguments_json="".join(call.arguments))
                for _, call in sorted(self.tool_calls.items())
            ),
        )


class GenerationFold:
    """Folds the events of one generation; knows nothing of calls, threads or loops.

    Args:
        n: Sequences that were asked for.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        # Made as they come: n is the caller's, and only the server knows that it is too large.
        self._sequences: dict[int, _Sequence] = {}
        self._finished: dict[int, Finished] = {}
        self._prompt_logprobs: list[PositionLogprobs] = []
        self.started: Started | None = None
        self.usage: Usage | None = None

    @property
    def complete(self) -> bool:
        """Whether every sequence has ended and the counts are there."""
        return self.started is not None and self.usage is not None and len(self._finished) == self._n

    @property
    def finished(self) -> tuple[Finished, ...]:
        """Ends of sequences that have come, by index."""
        return tuple(end for _, end in sorted(self._finished.items()))

    @property
    def sequences(self) -> int:
        """Sequences that were asked for."""
        return self._n

    def apply(self, event: pb.GenerateResponse) -> Delta | None:
        """Take the next event; returns the piece of output if it is one. Unknown events are ignored."""
        kind = event.WhichOneof("event")
        if kind == "delta":
            delta = _delta(event.delta)
            self._sequences.setdefault(delta.index, _Sequence()).add(delta)
            return delta
        if kind == "started":
            self.started = _started(event.started)
        elif kind == "prompt_logprobs":
            self._prompt_logprobs.extend(_position(position) for position in event.prompt_logprobs.positions)
        elif kind == "finished":
            self._finished[event.finished.index] = _finished(event.finished)
        elif kind == "usage":
            usage = event.usage
            self.usage = Usage(
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                output_tokens=usage.output_tokens,
            )
        return None

    def outputs(self) -> tuple[Output, ...]:
        """Return what has come of every sequence."""
        indices = sorted(self._sequences) if self.started is None else range(self._n)
        return tuple(
            self._sequences.get(index, _Sequence()).output(index, self._finished.get(index)) for index in indices
        )

    def result(self) -> GenerationResult:
        """Return the complete generation.

        Raises:
            ClientStateError: It is not complete.
        """
        if not self.complete or self.started is None or self.usage is None:
            raise ClientStateError("the generation has not ended: there is no result yet")
        return GenerationResult(
            started=self.started,
            outputs=self.outputs(),
            usage=self.usage,
            prompt_logprobs=tuple(self._prompt_logprobs),
        )

    def failed(self, cause: LoramuxError | None) -> LoramuxError:
        """Return the error for a stream that ends here, before it is complete.

        Args:
            cause: What the call ended with; None if it ended OK.
        """
        generation_id = None if self.started is None else self.started.generation_id
        if cause is not None and (self.started is None or cause.code not in _BROKEN):
            cause.generation_id = cause.generation_id or generation_id
            return cause
        outputs = self.outputs()
        received = sum(len(output.token_ids) for output in outputs)
        why = "it ended without Finished and Usage" if cause is None else cause.message
        error = StreamInterrupted(
            f"the stream broke after {received} tokens: {why}",
            code=None if cause is None else cause.code,
            reason="" if cause is None else cause.reason,
            metadata=None if cause is None else cause.metadata,
            retry_after=None if cause is None else cause.retry_after,
            generation_id=generation_id,
            request_id=None if cause is None else cause.request_id,
        )
        error.partial = outputs[0].text if outputs else ""
        error.tokens_received = received
        error.outputs = outputs
        return error
