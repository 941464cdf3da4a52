"""Every bound of a generation request, checked once, before anything is allocated for it.

`check_request` needs no tokenizer; `fit_prompt` decides on lengths when the token count is known. Messages name field,
number or enum and the way out, never prompt or stop text.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from loramux.v1 import generation_pb2 as pb
from loramux_server.errors import InvalidRequest, NotServedYet, Reason
from loramux_server.rpc.limits import Limits

_LONGEST_S = 86_400.0
# Without tools it says what is the case anyway.
_NO_CALLS = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling with every default filled in; lengths are still to be fitted to the prompt.

    Attributes mirror `SamplingParams`; `max_tokens` is None when the request leaves it to the server.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int
    max_tokens: int | None
    min_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    bad_words: list[str]
    ignore_eos: bool
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    truncate_prompt_tokens: int | None
    soft_time_limit: float | None
    include_stop: bool
    priority: int
    split_key: str


def invalid(field: str, problem: str, way_out: str) -> InvalidRequest:
    """Build an INVALID_PARAMETER error about one field."""
    return InvalidRequest(Reason.INVALID_PARAMETER, f"{field} {problem}; {way_out}", field=field)


def not_served(field: str) -> NotServedYet:
    """Build the error of an option that this server does not serve."""
    return NotServedYet(Reason.NOT_SERVED_YET, f"{field} is not served yet by this server; leave it unset", field=field)


def check_request(request: pb.GenerateRequest, limits: Limits, *, prefix: str = "") -> Sampling:
    """Check everything that can be checked before tokenization.

    Args:
        request: As received.
        limits: The server's bounds.
        prefix: Put before field names (`items[3].request.`).

    Returns:
        The sampling in effect.

    Raises:
        InvalidRequest: A field is out of its range, or the prompt is missing or empty.
        NotServedYet: The request uses an option that the API has and this server does not.
    """
    _check_prompt(request, limits, prefix)
    if request.HasField("adapter") and not request.adapter:
        raise invalid(f"{prefix}adapter", "is an empty string", "leave it absent for the default, or name an adapter")
    return check_sampling(request.sampling, limits, prefix=f"{prefix}sampling.")


def check_sampling(params: pb.SamplingParams, limits: Limits, *, prefix: str = "sampling.") -> Sampling:
    """Check `SamplingParams` and fill in its defaults; see `check_request` for the errors."""
    if params.HasField("response_format"):
        raise not_served(f"{prefix}response_format")
    max_tokens = params.max_tokens if params.HasField("max_tokens") else None
    if max_tokens is not None:
        _check_range(f"{prefix}max_tokens", max_tokens, 1, limits.max_output_tokens)
    min_tokens = params.min_tokens
    most = limits.max_output_tokens if max_tokens is None else max_tokens
    _check_range(f"{prefix}min_tokens", min_tokens, 0, most)
    truncate = params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None
    if truncate == 0:
        raise invalid(f"{prefix}truncate_prompt_tokens", "is 0", "use 1 or more, or leave it absent")
    _check_strings(f"{prefix}stop", params.stop, limits.max_stop_strings, limits.max_stop_bytes)
    _check_strings(f"{prefix}bad_words", params.bad_words, limits.max_bad_words, limits.max_stop_bytes)
    _check_count(f"{prefix}stop_token_ids", len(params.stop_token_ids), limits.max_stop_token_ids)
    _check_token_ids(f"{prefix}stop_token_ids", params.stop_token_ids, limits.vocab_size)
    return Sampling(
        temperature=_number(params, "temperature", 1.0, 0.0, 10.0, prefix),
        top_p=_number(params, "top_p", 1.0, 0.0, 1.0, prefix, above=True),
        top_k=params.top_k,
        min_p=_number(params, "min_p", 0.0, 0.0, 1.0, prefix),
        repetition_penalty=_number(params, "repetition_penalty", 1.0, 0.0, 10.0, prefix, above=True),
        presence_penalty=_number(params, "presence_penalty", 0.0, -2.0, 2.0, prefix),
        frequency_penalty=_number(params, "frequency_penalty", 0.0, -2.0, 2.0, prefix),
        logit_bias=_logit_bias(params, limits, prefix),
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        bad_words=list(params.bad_words),
        ignore_eos=params.ignore_eos,
        n=_optional(params, "n", 1, limits.max_sequences, prefix) or 1,
        logprobs=_optional(params, "logprobs", 0, limits.max_logprobs, prefix),
        prompt_logprobs=_optional(params, "prompt_logprobs", 0, limits.max_logprobs, prefix),
        truncate_prompt_tokens=truncate,
        soft_time_limit=_soft_time_limit(params, prefix),
        include_stop=params.include_stop,
        priority=_check_range(f"{prefix}priority", params.priority, -100, 100),
        split_key=_split_key(params, limits, prefix),
    )


def fit_prompt(token_ids: list[int], sampling: Sampling, limits: Limits, *, prefix: str = "") -> tuple[list[int], int]:
    """Truncate the prompt if asked to and decide how many tokens may be generated.

    Args:
        token_ids: The whole prompt.
        sampling: From `check_request`.
        limits: The server's bounds.
        prefix: Put before field names.

    Returns:
        Prompt ids and max_tokens, which together fit the context.

    Raises:
        InvalidRequest: The prompt is empty or, with its output, longer than the context.
    """
    if sampling.truncate_prompt_tokens is not None:
        token_ids = token_ids[-sampling.truncate_prompt_tokens :]
    if not token_ids:
        raise invalid(f"{prefix}prompt", "has no tokens", "give at least one token of prompt")
    room = limits.max_model_len - len(token_ids)
    if room < 1:
        raise _too_many_tokens(len(token_ids), limits, prefix)
    if sampling.max_tokens is None:
        most = min(room, limits.max_output_tokens)
        _check_range(f"{prefix}sampling.min_tokens", sampling.min_tokens, 0, most)
        return token_ids, most
    if sampling.max_tokens > room:
        raise invalid(
            f"{prefix}sampling.max_tokens",
            f"is {sampling.max_tokens}, but after {len(token_ids)} prompt tokens the context of "
            f"{limits.max_model_len} has room for {room}",
            f"use at most {room}, or leave it absent",
        )
    return token_ids, sampling.max_tokens


def check_token_ids(field: str, ids: Sequence[int], limits: Limits) -> None:
    """Check that ids are in the vocabulary.

    Raises:
        InvalidRequest: One is not.
    """
    _check_token_ids(field, ids, limits.vocab_size)


def check_chat(chat: pb.ChatPrompt, limits: Limits, *, prefix: str) -> None:
    """Check a conversation.

    Args:
        chat: As received.
        limits: The server's bounds.
        prefix: Name of the chat field (`chat`).

    Raises:
        InvalidRequest: No or too many messages, an unknown role, a missing content, contradicting options.
        NotServedYet: Tools or another option that is not served.
    """
    if not chat.messages:
        raise invalid(f"{prefix}.messages", "is empty", "give at least one message")
    _check_count(f"{prefix}.messages", len(chat.messages), limits.max_messages)
    if chat.tools:
        raise not_served(f"{prefix}.tools")
    if chat.tool_choice.WhichOneof("choice") is not None and chat.tool_choice != _NO_CALLS:
        raise not_served(f"{prefix}.tool_choice")
    if chat.continue_final_message:
        raise not_served(f"{prefix}.continue_final_message")
    if chat.HasField("enable_thinking"):
        raise not_served(f"{prefix}.enable_thinking")
    total = 0
    for position, message in enumerate(chat.messages):
        name = f"{prefix}.messages[{position}]"
        if message.role == pb.CHAT_ROLE_UNSPECIFIED or message.role not in pb.ChatRole.values():
            raise invalid(
                f"{name}.role", f"is {message.role}", "use CHAT_ROLE_SYSTEM, CHAT_ROLE_USER or CHAT_ROLE_ASSISTANT"
            )
        if message.role == pb.CHAT_ROLE_TOOL:
            raise not_served(f"{name}.role CHAT_ROLE_TOOL")
        if message.tool_calls:
            raise not_served(f"{name}.tool_calls")
        if message.HasField("tool_call_id"):
            raise invalid(f"{name}.tool_call_id", "is set on a message that is no tool's", "leave it unset")
        if message.HasField("reasoning_text"):
            raise not_served(f"{name}.reasoning_text")
        if not message.HasField("content"):
            raise invalid(f"{name}.content", "is absent", "give the message a content")
        total += len(message.content.encode()) + len(message.name.encode())
    check_prompt_bytes(prefix, total, limits)


def _check_prompt(request: pb.GenerateRequest, limits: Limits, prefix: str) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise invalid(f"{prefix}prompt", "is absent", "set one of text, token_ids and chat")
    if kind != "text" and request.HasField("add_special_tokens"):
        raise invalid(f"{prefix}add_special_tokens", f"is set with a {kind} prompt", "use it with text only")
    if kind == "text":
        if not request.text:
            raise invalid(f"{prefix}text", "is empty", "give at least one character of prompt")
        check_prompt_bytes(f"{prefix}text", len(request.text.encode()), limits)
    elif kind == "token_ids":
        ids = request.token_ids.ids
        if not ids:
            raise invalid(f"{prefix}token_ids.ids", "is empty", "give at least one token of prompt")
        truncated = request.sampling.HasField("truncate_prompt_tokens")
        if len(ids) > (limits.max_prompt_bytes if truncated else limits.max_model_len):
            raise _too_many_tokens(len(ids), limits, prefix)
        _check_token_ids(f"{prefix}token_ids.ids", ids, limits.vocab_size)
    else:
        check_chat(request.chat, limits, prefix=f"{prefix}chat")


def check_prompt_bytes(field: str, size: int, limits: Limits) -> None:
    """Check the size of a text before it is tokenized.

    Raises:
        InvalidRequest: PROMPT_TOO_LONG.
    """
    if size > limits.max_prompt_bytes:
        raise InvalidRequest(
            Reason.PROMPT_TOO_LONG,
            f"{field} has {size} bytes and this server takes {limits.max_prompt_bytes}; shorten the prompt",
            field=field,
            metadata={"prompt_bytes": str(size), "max_prompt_bytes": str(limits.max_prompt_bytes)},
        )


def check_duration(field: str, duration: Duration) -> float:
    """Check a time limit and return its seconds.

    Raises:
        InvalidRequest: It is 0, negative, malformed or longer than a day.
    """
    seconds = duration.seconds + duration.nanos / 1e9
    if not 0 <= duration.nanos < 1_000_000_000:
        raise invalid(field, f"has {duration.nanos} nanos", "use 0 to 999999999")
    if not 0 < seconds <= _LONGEST_S:
        raise invalid(field, f"is {seconds:g} s", f"use above 0 s, at most {_LONGEST_S:g} s")
    return seconds


def _check_range(field: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise invalid(field, f"is {value}", f"use {low} to {high}")
    return value


def _check_count(field: str, count: int, most: int) -> None:
    if count > most:
        raise invalid(field, f"has {count} entries", f"use at most {most}")


def _check_strings(field: str, values: Sequence[str], most: int, most_bytes: int) -> None:
    _check_count(field, len(values), most)
    for position, text in enumerate(values):
        size = len(text.encode())
        if not 1 <= size <= most_bytes:
            raise invalid(f"{field}[{position}]", f"has {size} bytes", f"use 1 to {most_bytes}")


def _too_many_tokens(count: int, limits: Limits, prefix: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.PROMPT_TOO_LONG,
        f"{prefix}prompt has {count} tokens and the context holds {limits.max_model_len}, one of them for output; "
        "shorten the prompt or set sampling.truncate_prompt_tokens",
        field=f"{prefix}prompt",
        metadata={"prompt_tokens": str(count), "max_model_len": str(limits.max_model_len)},
    )


def _check_token_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    # Of a million ids: as a list, and the largest one instead of the first bad one, or the event loop waits.
    values = list(ids)
    largest = max(values, default=0)
    if largest >= vocab_size:
        position = values.index(largest)
        raise invalid(f"{field}[{position}]", f"is {largest}", f"token ids of this model are 0 to {vocab_size - 1}")


def _number(
    params: pb.SamplingParams, name: str, default: float, low: float, high: float, prefix: str, *, above: bool = False
) -> float:
    """Check a float; `above` excludes the lower bound."""
    if not params.HasField(name):  # type: ignore[arg-type]
        return default
    value = float(getattr(params, name))
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        low_text = f"above {low:g}" if above else f"{low:g}"
        raise invalid(f"{prefix}{name}", f"is {value:g}", f"use {low_text} to {high:g}")
    return value


def _optional(params: pb.SamplingParams, name: str, low: int, high: int, prefix: str) -> int | None:
    if not params.HasField(name):  # type: ignore[arg-type]
        return None
    return _check_range(f"{prefix}{name}", int(getattr(params, name)), low, high)


def _logit_bias(params: pb.SamplingParams, limits: Limits, prefix: str) -> dict[int, float]:
    _check_count(f"{prefix}logit_bias", len(params.logit_bias), limits.max_logit_bias)
    bias: dict[int, float] = {}
    for token_id, value in params.logit_bias.items():
        if token_id >= limits.vocab_size:
            raise invalid(
                f"{prefix}logit_bias[{token_id}]",
                "is not a token id",
                f"token ids of this model are 0 to {limits.vocab_size - 1}",
            )
        if not math.isfinite(value) or abs(value) > 100:
            raise invalid(f"{prefix}logit_bias[{token_id}]", f"is {value:g}", "use -100 to 100")
        bias[token_id] = value
    return bias


def _soft_time_limit(params: pb.SamplingParams, prefix: str) -> float | None:
    if not params.HasField("soft_time_limit"):
        return None
    return check_duration(f"{prefix}soft_time_limit", params.soft_time_limit)


def _split_key(params: pb.SamplingParams, limits: Limits, prefix: str) -> str:
    if not params.HasField("split_key"):
        return ""
    size = len(params.split_key.encode())
    if not 1 <= size <= limits.max_split_key_bytes:
        raise invalid(f"{prefix}split_key", f"has {size} bytes", f"use 1 to {limits.max_split_key_bytes}")
    return params.split_key
