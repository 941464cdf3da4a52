"""One generation: from its `Add` to the events that its reader gets, whatever happens in between.

Every accepted request ends in exactly one way: `Usage` after all `Finished`, or an error. Leaving early, by an
exception or by closing the iterator, aborts it in the engine.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence

from google.protobuf.duration_pb2 import Duration

from loramux.v1 import common_pb2
from loramux.v1 import generation_pb2 as pb
from loramux_server.engine import messages as wire
from loramux_server.errors import Internal, LoramuxServerError, Reason
from loramux_server.rpc.admission import Ticket
from loramux_server.rpc.engine_client import EngineClient, error_of
from loramux_server.rpc.request_stream import RequestStream
from loramux_server.rpc.sequence_output import OutputPiece, SequenceOutput
from loramux_server.telemetry.generation import GenerationRecord

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "time_limit": pb.FINISH_REASON_TIME_LIMIT,
}
# Positions with 20 alternatives each in one message: the event loop goes on to others between two messages.
_MAX_POSITIONS = 256

TokenBytes = Callable[[int], bytes]


class Generation:
    """The life of one accepted request; iterate `events` once."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        add: wire.Add,
        tenant: str,
        outputs: Sequence[SequenceOutput],
        token_bytes: TokenBytes,
        shown_version: Callable[[str], str],
        replica_id: str,
        front_end_time: float,
        ticket: Ticket,
        record: GenerationRecord,
    ) -> None:
        """Prepare a generation; nothing is sent before `events` is iterated.

        Args:
            engine: Where it runs.
            add: The request.
            tenant: Whose it is; only they may cancel it.
            outputs: One for each of the n sequences.
            token_bytes: Bytes of a token id, for log-probabilities.
            shown_version: From the engine's version key to the API's version name.
            replica_id: For `Started`.
            front_end_time: Seconds from receipt until now, part of its queue time.
            ticket: Its place in the queue, given back at `Started`.
            record: Its telemetry.
        """
        self.add = add
        self.tenant = tenant
        self._engine = engine
        self._outputs = outputs
        self._token_bytes = token_bytes
        self._shown_version = shown_version
        self._replica_id = replica_id
        self._front_end_time = front_end_time
        self._ticket = ticket
        self._record = record
        self._stream: RequestStream | None = None
        self._cancelled = False
        self._cached_tokens = 0

    @property
    def generation_id(self) -> str:
        """Id that `CancelGeneration` takes."""
        return self.add.request_id

    @property
    def pending_bytes(self) -> int:
        """Bytes of output that wait for the reader."""
        return 0 if self._stream is None else self._stream.pending_bytes

    @property
    def started(self) -> bool:
        """Whether the engine admitted it."""
        return self._stream is not None and self._stream.started

    @property
    def alive(self) -> bool:
        """Whether it has not ended; its reader may still have events to take when it has."""
        return self._stream is None or not self._stream.done

    def cancel(self) -> None:
        """End it from outside: its reader gets `Finished` with reason CANCELLED and `Usage`."""
        self._cancelled = True
        self._engine.abort(self.generation_id)

    async def events(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Send the request and yield its events.

        Raises:
            LoramuxServerError: The engine is away, or it failed the request.
        """
        stream: RequestStream | None = None
        try:
            stream = self._stream = self._engine.submit(self.add)
            while True:
                for event in await stream.read():
                    for response in self._responses(event):
                        yield response
                    if isinstance(event, wire.Done):
                        return
        except LoramuxServerError as error:
            self._record.failed(error.reason.value)
            raise
        except Exception:
            self._record.failed(Reason.INTERNAL.value)
            raise
        finally:
            self._ticket.leave()
            if stream is not None:
                self._engine.release(stream)
            self._record.ended()

    # --- engine event -> responses ---------------------------------------------------------------------------------

    def _responses(self, event: object) -> Iterable[pb.GenerateResponse]:
        """Make the responses to one event, those with log-probabilities one by one as they are asked for."""
        if isinstance(event, wire.Tokens):
            return self._on_tokens(event)
        if isinstance(event, wire.SequenceFinished):
            return self._on_sequence_finished(event)
        if isinstance(event, wire.Started):
            started = self._on_started(event)
            prompt = self.add.prompt_token_ids
            if self.add.sampling.prompt_logprobs is None or len(prompt) > 1:
                return [started]
            # Nothing follows the only token, so the engine has nothing to say; its own entry has no log-probability.
            chunk = pb.PromptLogprobs(positions=[pb.PositionLogprobs(token=self._token(prompt[0], None))])
            return [started, pb.GenerateResponse(prompt_logprobs=chunk)]
        if isinstance(event, wire.PromptLogprobs):
            return self._on_prompt_logprobs(event)
        assert isinstance(event, wire.Done)
        return self._on_done(event)

    def _on_started(self, event: wire.Started) -> pb.GenerateResponse:
        self._ticket.leave()
        self._cached_tokens = event.cached_tokens
        self._record.started(event)
        started = pb.Started(
            generation_id=self.generation_id,
            replica_id=self._replica_id,
            prompt_tokens=len(self.add.prompt_token_ids),
            cached_tokens=event.cached_tokens,
            seed=self.add.sampling.seed,
            queue_time=_duration(self._front_end_time + event.queue_time),
        )
        if event.load_time > 0:
            started.adapter_load_time.CopyFrom(_duration(event.load_time))
        if event.version:
            shown = self._shown_version(event.version)
            started.adapter.CopyFrom(
                common_pb2.AdapterVersionRef(
                    adapter=shown.partition("/versions/")[0],
                    version=shown,
                    digest=event.digest,
                    revision=event.revision,
                )
            )
        return pb.GenerateResponse(started=started)

    def _on_prompt_logprobs(self, event: wire.PromptLogprobs) -> Iterator[pb.GenerateResponse]:
        prompt = self.add.prompt_token_ids
        chunk = pb.PromptLogprobs(offset=event.start)
        if event.start == 1:
            chunk.offset = 0
            chunk.positions.add(token=self._token(prompt[0], None))
        for position, entry in enumerate(event.entries, start=event.start):
            if len(chunk.positions) >= _MAX_POSITIONS:
                yield pb.GenerateResponse(prompt_logprobs=chunk)
                chunk = pb.PromptLogprobs(offset=position)
            logprob = None if position == 0 else entry.logprob
            chunk.positions.append(self._position(prompt[position], logprob, entry.top if position else ()))
        yield pb.GenerateResponse(prompt_logprobs=chunk)

    def _on_tokens(self, event: wire.Tokens) -> Iterator[pb.GenerateResponse]:
        output = self._outputs[event.index]
        if output.finished:
            return
        self._record.tokens(len(event.token_ids))
        piece = output.push(event.token_ids, event.logprobs)
        if piece.matched is not None:
            self._engine.send(wire.Stop(request_id=self.generation_id, index=event.index, tokens=output.tokens))
        yield from self._deltas(event.index, piece)
        if piece.matched is not None:
            yield self._finished(event.index, pb.FINISH_REASON_STOP, pb.MatchedStop(stop=piece.matched))

    def _on_sequence_finished(self, event: wire.SequenceFinished) -> Iterator[pb.GenerateResponse]:
        output = self._outputs[event.index]
        if output.finished:
            return
        piece = output.finish()
        yield from self._deltas(event.index, piece)
        matched: pb.MatchedStop | None = None
        reason = _REASONS[event.reason]
        if piece.matched is not None:
            reason, matched = pb.FINISH_REASON_STOP, pb.MatchedStop(stop=piece.matched)
        elif event.stop_token_id is not None:
            if event.stop_token_id in self.add.sampling.stop_token_ids:
                matched = pb.MatchedStop(stop_token_id=event.stop_token_id)
            else:
                matched = pb.MatchedStop(eos_token_id=event.stop_token_id)
        yield self._finished(event.index, reason, matched)

    def _on_done(self, event: wire.Done) -> list[pb.GenerateResponse]:
        self._record.done(event)
        if event.status == "failed":
            raise error_of(event.error)
        if event.status == "cancelled" and not self._cancelled:
            # The engine reports a passed deadline as a failure, so this is its own end.
            self._engine.check_serving()
            raise self._engine.unavailable("the engine cancelled the request")
        responses: list[pb.GenerateResponse] = []
        for index, output in enumerate(self._outputs):
            if output.finished:
                continue
            if event.status == "finished":
                raise Internal(Reason.INTERNAL, f"sequence {index} never finished")
            responses += self._deltas(index, output.finish())
            responses.append(self._finished(index, pb.FINISH_REASON_CANCELLED, None))
        usage = pb.Usage(
            prompt_tokens=len(self.add.prompt_token_ids),
            cached_tokens=self._cached_tokens,
            output_tokens=sum(output.tokens for output in self._outputs),
        )
        self._record.usage(output_tokens=usage.output_tokens, cancelled=event.status == "cancelled")
        responses.append(pb.GenerateResponse(usage=usage))
        return responses

    def _deltas(self, index: int, piece: OutputPiece) -> Iterator[pb.GenerateResponse]:
        if not piece.text and not piece.token_ids:
            return
        if not piece.logprobs:
            yield pb.GenerateResponse(delta=pb.Delta(index=index, text=piece.text, token_ids=piece.token_ids))
            return
        for start in range(0, len(piece.token_ids), _MAX_POSITIONS):
            ids = piece.token_ids[start : start + _MAX_POSITIONS]
            entries = piece.logprobs[start : start + _MAX_POSITIONS]
            positions = [
                self._position(token_id, entry.logprob, entry.top) for token_id, entry in zip(ids, entries, strict=True)
            ]
            delta = pb.Delta(index=index, text="" if start else piece.text, token_ids=ids, logprobs=positions)
            yield pb.GenerateResponse(delta=delta)

    def _finished(
        self, index: int, reason: pb.FinishReason.ValueType, matched: pb.MatchedStop | None
    ) -> pb.GenerateResponse:
        self._record.finished(pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower())
        return pb.GenerateResponse(finished=pb.Finished(index=index, reason=reason, matched_stop=matched))

    def _position(self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> pb.PositionLogprobs:
        return pb.PositionLogprobs(
            token=self._token(token_id, logprob), top=[self._token(other, value) for other, value in top]
        )

    def _token(self, token_id: int, logprob: float | None) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=token_id, logprob=logprob, token_bytes=self._token_bytes(token_id))


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, int(seconds * 1e9)))
    return duration
