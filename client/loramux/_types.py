"""Values of generation answers: events, results, tokens."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from loramux._errors import InvalidRequest, LoramuxError
from loramux._prompt_types import ToolCall


class FinishReason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token, a stop string, or a complete grammar; see `Finished.matched_stop`."""
    LENGTH = "length"
    """`max_tokens` or the context was used up."""
    TOOL_CALLS = "tool_calls"
    """The model called tools."""
    TIME_LIMIT = "time_limit"
    """`soft_time_limit` passed."""
    CANCELLED = "cancelled"
    """Somebody called `cancel` for it."""
    INTERRUPTED = "interrupted"
    """The stream broke before the sequence had ended. Only in `StreamInterrupted.outputs`."""
    UNKNOWN = "unknown"
    """A reason that this version of the SDK does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersionRef:
    """One adapter version, named so that an answer can be traced to the exact bytes that produced it.

    Attributes:
        adapter: Full name, `tenants/{t}/adapters/{a}`.
        version: Full name, `tenants/{t}/adapters/{a}/versions/{v}`.
        digest: sha256 in 64 hexadecimal digits.
        revision: Registry revision whose traffic table chose it.
    """

    adapter: str
    version: str
    digest: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was admitted.

    Attributes:
        generation_id: Id of the generation; takes `cancel`.
        adapter: The adapter version that produces every token; None for the base alone.
        replica_id: Replica that runs the request.
        prompt_tokens: Tokens of the prompt after truncation.
        cached_tokens: Prompt tokens from the prefix cache.
        seed: Seed in effect.
        queue_time: Seconds from receipt to admission.
        adapter_load_time: Seconds of it spent on loading the adapter.
        raw: The protobuf message, for those who need it.
    """

    generation_id: str
    adapter: AdapterVersionRef | None
    replica_id: str
    prompt_tokens: int
    cached_tokens: int
    seed: int
    queue_time: float
    adapter_load_time: float
    raw: Any = field(default=None, repr=False, compare=False)

    @property
    def adapter_version(self) -> str | None:
        """Full name of the adapter version; None for the base alone."""
        return None if self.adapter is None else self.adapter.version


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and its log-probability.

    Attributes:
        token_id: Token id.
        logprob: Natural log under the raw logits; None at prompt position 0.
        token_bytes: Bytes of the token, maybe a part of a character.
    """

    token_id: int
    logprob: float | None
    token_bytes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLogprobs:
    """Log-probabilities at one position.

    Attributes:
        token: The token that stands there.
        top: The most probable tokens, most probable first.
    """

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
        index: Which call of the sequence, from 0.
        id: Id of the call, in its first piece.
        name: Function name, in its first piece.
        arguments_json: Next part of the arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments_json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """More output of one sequence.

    Attributes:
        index: Which of the n sequences, from 0.
        text: New text; may be empty while a character or a possible stop string is incomplete.
        token_ids: New token ids; text may lag behind them.
        logprobs: One entry for each token id, if asked for.
        reasoning_text: New text of the reasoning part.
        tool_calls: Pieces of tool calls.
        raw: The protobuf message, for those who need it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    reasoning_text: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedStop:
    """What ended a sequence with reason STOP; one field is set.

    Attributes:
        eos_token_id: One of the model's end-of-sequence ids.
        stop_token_id: One of `stop_token_ids`.
        stop: One of `stop`.
    """

    eos_token_id: int | None = None
    stop_token_id: int | None = None
    stop: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One sequence has ended.

    Attributes:
        index: Which of the n sequences, from 0.
        reason: Why.
        matched_stop: What matched; None with another reason or a complete grammar.
        raw: The protobuf message, for those who need it.
    """

    index: int
    reason: FinishReason
    matched_stop: MatchedStop | None = None
    raw: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a generation.

    Attributes:
        prompt_tokens: Tokens of the prompt, counted once whatever n is.
        cached_tokens: Prompt tokens from the prefix cache.
        output_tokens: Generated tokens of all sequences.
    """

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One generated sequence.

    Attributes:
        index: Which of the n sequences, from 0.
        text: The text.
        token_ids: The token ids.
        finish_reason: Why it ended.
        matched_stop: What matched, with reason STOP.
        logprobs: One entry for each token id, if asked for.
        reasoning_text: The reasoning part, not repeated in `text`.
        tool_calls: Calls that the model made.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: MatchedStop | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    reasoning_text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A complete generation.

    Attributes:
        started: What ran, where, and what it cost to get there.
        outputs: The n sequences, by index.
        usage: Token counts.
        prompt_logprobs: One entry a prompt token, if asked for.
    """

    started: Started
    outputs: tuple[Output, ...]
    usage: Usage
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()

    def _only(self, name: str) -> Output:
        """Return the single output, or refuse to pick one of several."""
        if len(self.outputs) != 1:
            raise InvalidRequest(f"the result has {len(self.outputs)} sequences: read outputs[i].{name}")
        return self.outputs[0]

    @property
    def text(self) -> str:
        """Text of the only sequence; InvalidRequest if there are several."""
        return self._only("text").text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the only sequence; InvalidRequest if there are several."""
        return self._only("token_ids").token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the only sequence ended; InvalidRequest if there are several."""
        return self._only("finish_reason").finish_reason

    @property
    def generation_id(self) -> str:
        """Id of the generation."""
        return self.started.generation_id

    @property
    def adapter_version(self) -> str | None:
        """Full name of the adapter version that produced it; None for the base alone."""
        return self.started.adapter_version


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchItem:
    """Answer to one request of a batch; one of result and error is set.

    Attributes:
        item_id: Id of the request.
        result: The generation, if it went well.
        error: Why it failed, if it did.
    """

    item_id: str
    result: GenerationResult | None = None
    error: LoramuxError | None = None

    def unwrap(self) -> GenerationResult:
        """Return the result or raise the error."""
        if self.error is not None:
            raise self.error
        assert self.result is not None, "an item has a result or an error"
        return self.result


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """Token ids of a text.

    Attributes:
        token_ids: The token ids.
        offsets: For each token the first and one past the last code point that it covers, if asked for.
        max_model_len: The model's context in tokens, prompt and output together.
    """

    token_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    max_model_len: int
