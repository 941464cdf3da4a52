"""From the SDK's values to the messages of the generation calls."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, SupportsIndex, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from loramux._errors import FieldViolation, InvalidRequest
from loramux._prompt_types import (
    BatchRequest,
    ChatMessage,
    ChatPrompt,
    Prompt,
    ResponseFormat,
    SamplingFields,
    SamplingParams,
    Tool,
)
from loramux.v1 import generation_pb2 as pb

T = TypeVar("T")

MAX_MESSAGE_BYTES = 4 * 1024 * 1024

_ROLES = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
    "tool": pb.CHAT_ROLE_TOOL,
}
_TOOL_MODES = {
    "auto": pb.TOOL_CHOICE_MODE_AUTO,
    "none": pb.TOOL_CHOICE_MODE_NONE,
    "required": pb.TOOL_CHOICE_MODE_REQUIRED,
}
_SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))
_ONE_KIND = "a prompt is text, or a list of token ids, or a list of loramux.ChatMessage"
_REPEATED = frozenset({"stop", "stop_token_ids", "bad_words"})


def invalid(name: str, problem: str) -> InvalidRequest:
    """Build the error for a field that is refused before anything is sent."""
    return InvalidRequest(
        f"{name} {problem}",
        reason="INVALID_PARAMETER",
        field_violations=(FieldViolation(field=name, description=problem),),
    )


def check_size(message: Message) -> None:
    """Refuse a message that no server takes, before it is sent.

    Raises:
        InvalidRequest: It is larger than 4 MiB.
    """
    size = message.ByteSize()
    if size > MAX_MESSAGE_BYTES:
        raise invalid("request", f"has {size} bytes; a message may have at most {MAX_MESSAGE_BYTES}")


def build(name: str, make: Callable[[], T]) -> T:
    """Run `make`, which fills a message, and name the field if protobuf refuses a value.

    Raises:
        InvalidRequest: A value has the wrong type, or does not fit its integer or text type.
    """
    try:
        return make()
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise invalid(name, f"has a value of the wrong type or range: {error}") from error


def duration(name: str, seconds: float) -> Duration:
    """Convert seconds; anything that is not a finite number is refused."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise invalid(name, f"is {seconds!r}; it must be a finite number of seconds")
    whole = math.floor(seconds)
    nanos = round((seconds - whole) * 1e9)
    return Duration(seconds=whole + nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def _json_text(value: str | Mapping[str, Any]) -> str:
    """Pass JSON text on and render a mapping."""
    return value if isinstance(value, str) else json.dumps(value)


def merge_sampling(base: SamplingParams | None, given: SamplingFields) -> SamplingParams | None:
    """Lay keywords over `base`; None means not given.

    Raises:
        InvalidRequest: A keyword is no field of SamplingParams.
    """
    unknown = sorted(set(given) - _SAMPLING_NAMES)
    if unknown:
        raise invalid(unknown[0], "is not a sampling field; see loramux.SamplingParams")
    set_fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not set_fields:
        return base
    return replace(base or SamplingParams(), **set_fields)


def _response_format(value: ResponseFormat) -> pb.ResponseFormat:
    """Convert a response format."""
    if value.json_schema is not None:
        return pb.ResponseFormat(json_schema=_json_text(value.json_schema))
    if value.regex is not None:
        return pb.ResponseFormat(regex=value.regex)
    if value.lark_grammar is not None:
        return pb.ResponseFormat(lark_grammar=value.lark_grammar)
    return pb.ResponseFormat(choice=pb.ChoiceFormat(choices=list(value.choice or ())))


def sampling_message(params: SamplingParams) -> pb.SamplingParams:
    """Convert sampling parameters; fields that are None stay absent.

    Raises:
        InvalidRequest: A value has the wrong type or does not fit the field; names it.
    """
    message = pb.SamplingParams()
    for field in fields(SamplingParams):
        name, value = field.name, getattr(params, field.name)
        if value is None:
            continue
        _set_sampling(message, name, value)
    return message


def _set_sampling(message: pb.SamplingParams, name: str, value: Any) -> None:
    """Set one field of the message."""

    def assign() -> None:
        if name == "logit_bias":
            for token_id, bias in value.items():
                message.logit_bias[token_id] = bias
        elif name == "response_format":
            message.response_format.CopyFrom(_response_format(value))
        elif name == "soft_time_limit":
            message.soft_time_limit.CopyFrom(duration("sampling.soft_time_limit", value))
        elif name in _REPEATED:
            # A lone string is one stop string, not one a character.
            getattr(message, name).extend([value] if isinstance(value, str) else value)
        else:
            setattr(message, name, value)

    build(f"sampling.{name}", assign)


def _tool(tool: Tool) -> pb.Tool:
    """Convert a tool."""
    message = pb.Tool(name=tool.name)
    if tool.description is not None:
        message.description = tool.description
    if tool.parameters is not None:
        message.parameters_json_schema = _json_text(tool.parameters)
    return message


def _chat_message(index: int, message: ChatMessage) -> pb.ChatMessage:
    """Convert a message of a chat."""
    name = f"prompt.messages[{index}]"
    if not isinstance(message, ChatMessage):
        raise invalid(name, f"is a {type(message).__name__}; it must be a loramux.ChatMessage")
    if message.role not in _ROLES:
        raise invalid(f"{name}.role", f"is {message.role!r}; it must be one of {', '.join(_ROLES)}")

    def make() -> pb.ChatMessage:
        result = pb.ChatMessage(role=_ROLES[message.role])
        for attribute in ("content", "tool_call_id", "name", "reasoning_text"):
            value = getattr(message, attribute)
            if value is not None:
                setattr(result, attribute, value)
        for call in message.tool_calls:
            result.tool_calls.add(id=call.id, name=call.name, arguments_json=call.arguments_json)
        return result

    return build(name, make)


def _chat(prompt: ChatPrompt) -> pb.ChatPrompt:
    """Convert a chat."""
    if not prompt.messages:
        raise invalid("prompt", "is an empty chat; it needs at least one message")
    message = pb.ChatPrompt(messages=[_chat_message(i, m) for i, m in enumerate(prompt.messages)])
    message.tools.extend(build("prompt.tools", lambda: [_tool(tool) for tool in prompt.tools]))
    if prompt.tool_choice is not None:
        if prompt.tool_choice in _TOOL_MODES:
            message.tool_choice.mode = _TOOL_MODES[prompt.tool_choice]
        else:
            message.tool_choice.function = prompt.tool_choice
    for name in ("add_generation_prompt", "continue_final_message", "enable_thinking"):
        value = getattr(prompt, name)
        if value is not None:
            setattr(message, name, value)
    return message


def _prompt_parts(prompt: Prompt) -> str | pb.TokenIds | pb.ChatPrompt:
    """Tell the kinds of a prompt apart.

    Raises:
        InvalidRequest: It is empty, or neither text, token ids nor chat messages.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, ChatPrompt):
        return _chat(prompt)
    if isinstance(prompt, ChatMessage):
        return _chat(ChatPrompt([prompt]))
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise invalid("prompt", f"is a {type(prompt).__name__}; it must be text, token ids or chat messages")
    if not prompt:
        raise invalid("prompt", "is empty; give text, token ids or chat messages")
    items: Sequence[object] = prompt
    if isinstance(items[0], ChatMessage):
        return _chat(ChatPrompt([_same_kind(index, item) for index, item in enumerate(items)]))
    token_ids: list[int] = []
    for index, item in enumerate(items):
        # Any integer will do, those of array libraries too; True is no token.
        if isinstance(item, bool) or not isinstance(item, SupportsIndex):
            raise invalid(f"prompt[{index}]", f"is a {type(item).__name__}; {_ONE_KIND}")
        token_ids.append(operator.index(item))
    return build("prompt", lambda: pb.TokenIds(ids=token_ids))


def _same_kind(index: int, item: object) -> ChatMessage:
    """Refuse a list that mixes messages and other things."""
    if not isinstance(item, ChatMessage):
        raise invalid(f"prompt[{index}]", f"is a {type(item).__name__}; {_ONE_KIND}")
    return item


def generate_request(
    prompt: Prompt,
    *,
    adapter: str | None,
    sampling: SamplingParams | None,
    add_special_tokens: bool | None,
) -> pb.GenerateRequest:
    """Build the request of one generation.

    Raises:
        InvalidRequest: Something in it can never be served; names the field.
    """
    request = pb.GenerateRequest()
    parts = _prompt_parts(prompt)
    if isinstance(parts, str):
        if not parts:
            raise invalid("prompt", "is empty; give text, token ids or chat messages")
        build("prompt", lambda: setattr(request, "text", parts))
    elif isinstance(parts, pb.TokenIds):
        request.token_ids.CopyFrom(parts)
    else:
        request.chat.CopyFrom(parts)
    if adapter is not None:
        if not adapter:
            raise invalid("adapter", "is empty; leave it out for the tenant's default")
        build("adapter", lambda: setattr(request, "adapter", adapter))
    if sampling is not None:
        request.sampling.CopyFrom(sampling_message(sampling))
    if add_special_tokens is not None:
        build("add_special_tokens", lambda: setattr(request, "add_special_tokens", add_special_tokens))
    check_size(request)
    return request


def batch_item(index: int, item: BatchRequest | Prompt, adapter: str | None) -> pb.BatchGenerateItem:
    """Build one item of a batch.

    Args:
        index: Position in the job, from 0; the item's id unless it has one.
        item: The request, or just its prompt.
        adapter: Adapter for items that name none.

    Raises:
        InvalidRequest: Something in it can never be served.
    """
    request = item if isinstance(item, BatchRequest) else BatchRequest(item)
    message = pb.BatchGenerateItem()
    item_id = str(index) if request.item_id is None else request.item_id
    build("item_id", lambda: setattr(message, "item_id", item_id))
    message.request.CopyFrom(
        generate_request(
            request.prompt,
            adapter=adapter if request.adapter is None else request.adapter,
            sampling=request.sampling,
            add_special_tokens=request.add_special_tokens,
        )
    )
    if request.timeout is not None:
        message.timeout.CopyFrom(duration("timeout", request.timeout))
    return message


def tokenize_request(prompt: Prompt, *, add_special_tokens: bool | None, offsets: bool) -> pb.TokenizeRequest:
    """Build the request of a tokenization.

    Raises:
        InvalidRequest: The prompt is neither text nor chat messages.
    """
    request = pb.TokenizeRequest()
    parts = _prompt_parts(prompt)
    if isinstance(parts, str):
        build("prompt", lambda: setattr(request, "text", parts))
    elif isinstance(parts, pb.ChatPrompt):
        request.chat.CopyFrom(parts)
    else:
        raise invalid("prompt", "is token ids already; give text or chat messages")
    if add_special_tokens is not None:
        request.add_special_tokens = add_special_tokens
    if offsets:
        request.include_offsets = True
    check_size(request)
    return request
