"""Values of generation requests: prompts, sampling, items of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from loramux._errors import InvalidRequest


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
