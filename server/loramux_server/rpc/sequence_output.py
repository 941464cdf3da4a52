"""From the token ids of one sequence to what its reader sees: text, held-back stop candidates, the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loramux_server.engine import messages as wire
from loramux_server.text.detokenizer import IncrementalDetokenizer
from loramux_server.text.stop import StopMatcher
from loramux_server.text.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class OutputPiece:
    """New output of one sequence.

    Attributes:
        text: New text that can no longer begin a stop string.
        token_ids: New ids, up to and including the one that completed a stop.
        logprobs: One entry an id, if the engine sent them.
        matched: The stop string that ended the sequence, or None.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[wire.TokenLogprob] = field(default_factory=list)
    matched: str | None = None


class SequenceOutput:
    """One sequence of a request.

    The first `min_tokens` tokens bypass the stop matcher, since no stop may match before them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str],
        include_stop: bool,
        end_token_ids: frozenset[int],
        min_tokens: int,
    ) -> None:
        """Create an empty sequence.

        Args:
            tokenizer: Of the served model.
            stop: Stop strings.
            include_stop: Keep the text of what ended the sequence.
            end_token_ids: Ids that end it, the model's own included unless they are ignored.
            min_tokens: Tokens before which nothing ends it.
        """
        self.tokens = 0
        self.finished = False
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._decode_end: Callable[[int], str] = lambda token: tokenizer.decode([token], skip_special_tokens=False)
        self._matcher = StopMatcher(list(stop), include_stop) if stop else None
        self._include_stop = include_stop
        self._end_token_ids = end_token_ids
        self._min_tokens = min_tokens

    def push(self, token_ids: Sequence[int], logprobs: Sequence[wire.TokenLogprob]) -> OutputPiece:
        """Take new tokens in order.

        Args:
            token_ids: Ids that the engine sent, an end token last if one came.
            logprobs: Empty, or one an id.
        """
        assert not self.finished, "tokens after the end of a sequence"
        if self._matcher is None:
            return self._push_plain(token_ids, logprobs)
        piece = OutputPiece()
        for position, token_id in enumerate(token_ids):
            self.tokens += 1
            piece.token_ids.append(token_id)
            if logprobs:
                piece.logprobs.append(logprobs[position])
            piece.text += self._match(self._text_of(token_id), piece)
            if piece.matched is not None:
                self.finished = True
                break
        return piece

    def finish(self) -> OutputPiece:
        """End the sequence: text that was held back comes out, unless it completes a stop string after all."""
        piece = OutputPiece()
        tail = self._detokenizer.flush()
        if self._matcher is None:
            piece.text = tail
        else:
            piece.text = self._match(tail, piece) if tail else ""
            if piece.matched is None:
                piece.text += self._matcher.flush()
        self.finished = True
        return piece

    def _push_plain(self, token_ids: Sequence[int], logprobs: Sequence[wire.TokenLogprob]) -> OutputPiece:
        self.tokens += len(token_ids)
        piece = OutputPiece(token_ids=list(token_ids), logprobs=list(logprobs))
        if token_ids and token_ids[-1] in self._end_token_ids:
            piece.text = self._detokenizer.push(token_ids[:-1]) + self._text_of(token_ids[-1])
        else:
            piece.text = self._detokenizer.push(token_ids)
        return piece

    def _text_of(self, token_id: int) -> str:
        if token_id not in self._end_token_ids:
            return self._detokenizer.push([token_id])
        return self._detokenizer.flush() + self._decode_end(token_id) if self._include_stop else ""

    def _match(self, text: str, piece: OutputPiece) -> str:
        assert self._matcher is not None
        if self.tokens < self._min_tokens:
            return text
        emit, match = self._matcher.push(text, self.tokens)
        if match is not None:
            piece.matched = match.stop
        return emit
