"""Values of the generation calls: prompts, sampling, events and results."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from loramux._errors import InvalidRequest, LoramuxError


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
class ToolCall:
    """A call of a function that the model made.

    Attributes:
        name: Function name.
        arguments_json: Arguments as JSON text.
        id: Ties the result to the call.
    """

    name: str
    arguments_json: str = "{}"
    id: str = ""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: What is said; None only for an assistant message with tool calls.
        tool_calls: Calls that an assistant message made.
        tool_call_id: For a tool message, the call that it answers.
        name: Name of the speaker or tool, handed to the template.
        reasoning_text: Reasoning of an assistant message, handed to templates that use it.
    """

    role: str
    content: str | None = None
    tool_calls: Sequence[ToolCall] = field(default=(), kw_only=True)
    tool_call_id: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    reasoning_text: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: Function name, 1 to 64 of letters, digits, `_` and `-`.
        description: What it does, for the model to read.
        parameters: JSON Schema of the arguments, as JSON text or as a mapping; None means any object.
    """

    name: str
    description: str | None = None
    parameters: str | Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation with options; a plain list of messages does where none is needed.

    Attributes:
        messages: The messages, oldest first.
        tools: Functions that the model may call.
        tool_choice: `auto`, `none`, `required`, or the name of the function that must be called; None is the server's
            default (auto if there are tools).
        add_generation_prompt: Whether the prompt ends with the opening of an assistant message; None is the default.
        continue_final_message: Whether the last message, an assistant's, is continued; None is no.
        enable_thinking: Switches the reasoning part of templates that have the switch; None is the template's default.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = field(default=(), kw_only=True)
    tool_choice: str | None = field(default=None, kw_only=True)
    add_generation_prompt: bool | None = field(default=None, kw_only=True)
    continue_final_message: bool | None = field(default=None, kw_only=True)
    enable_thinking: bool | None = field(default=None, kw_only=True)


Prompt = str | Sequence[int] | Sequence[ChatMessage] | ChatPrompt
"""Text, token ids, chat messages, or a chat with options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFormat:
    """Shape that the output must have; exactly one field is set.

    Attributes:
        json_schema: JSON Schema as JSON text or as a mapping.
        regex: Regular expression that the whole output matches.
        lark_grammar: Grammar in Lark syntax.
        choice: Exactly one of these strings.

    Raises:
        InvalidRequest: None or several are set.
    """

    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    lark_grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check that one is set."""
        given = [name for name in ("json_schema", "regex", "lark_grammar", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(f"ResponseFormat takes exactly one of its fields, not {given or 'none'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample, when to stop and what to report. None leaves a field to the server's default.

    Attributes:
        temperature: Divisor of the logits, 0 to 10; 0 is greedy. Default 1.0.
        top_p: Smallest set of tokens with this probability, above 0 to 1. Default 1.0, off.
        top_k: The k most probable tokens. Default 0, off.
        min_p: Drops tokens below this share of the most probable one, 0 to 1. Default 0.0, off.
        repetition_penalty: Divides logits of tokens seen in prompt or output, above 0 to 10. Default 1.0, off.
        presence_penalty: Subtracted once for a token that the output has, -2 to 2. Default 0.0, off.
        frequency_penalty: Subtracted for each time that the output has it, -2 to 2. Default 0.0, off.
        logit_bias: Added to the logits of these token ids, -100 to 100.
        seed: Unsigned 64-bit seed. Default: the server draws one and tells it in `Started`.
        max_tokens: Most tokens a sequence, at least 1. Default: what the context and the server's limit leave.
        min_tokens: Tokens before which nothing ends a sequence. Default 0.
        stop: A string or strings that end a sequence.
        stop_token_ids: Token ids that end a sequence.
        bad_words: Words that are never generated.
        ignore_eos: Whether to go on past the model's end-of-sequence ids. Default False.
        n: Sequences from the prompt. Default 1.
        logprobs: Reports the log-probability of each token and of this many most probable ones; 0 the token alone.
        prompt_logprobs: The same for the prompt.
        response_format: Shape that the output must have.
        truncate_prompt_tokens: Keeps only the last so many tokens of the prompt.
        soft_time_limit: Seconds after which the generation ends with what there is.
        include_stop: Whether the text includes what stopped it. Default False.
        priority: Order among the waiting requests of the same tenant, larger first, -100 to 100. Default 0.
        split_key: Key that makes the choice of a weighted adapter sticky, 1 to 256 bytes.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: int | None = None
    soft_time_limit: float | None = None
    include_stop: bool | None = None
    priority: int | None = None
    split_key: str | None = None


class SamplingFields(TypedDict, total=False):
    """Keywords of `generate` that set a field of `SamplingParams`; they win over `sampling`."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    ignore_eos: bool | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    response_format: ResponseFormat | None
    truncate_prompt_tokens: int | None
    soft_time_limit: float | None
    include_stop: bool | None
    priority: int | None
    split_key: str | None


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


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch.

    Attributes:
        prompt: What to continue.
        item_id: Id that marks the answer, 1 to 128 bytes, unique in the job; None takes the position, from 0.
        adapter: Adapter to use; None takes the client's.
        sampling: How to sample; None leaves all to the server.
        timeout: Seconds that the item may take once it has entered the tenant's queue; None for no limit of its own.
        add_special_tokens: Whether special tokens are added to a text prompt; None is yes.
    """

    prompt: Prompt
    item_id: str | None = field(default=None, kw_only=True)
    adapter: str | None = field(default=None, kw_only=True)
    sampling: SamplingParams | None = field(default=None, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    add_special_tokens: bool | None = field(default=None, kw_only=True)


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
