"""Building of requests: presence, kinds of prompts, refusals that name the field."""

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from loramux import (
    BatchRequest,
    ChatMessage,
    ChatPrompt,
    InvalidRequest,
    ResponseFormat,
    SamplingFields,
    SamplingParams,
    Tool,
    ToolCall,
)
from loramux._requests import batch_item, generate_request, merge_sampling, sampling_message, tokenize_request
from loramux.v1 import generation_pb2 as pb


def request(prompt: Any, **values: Any) -> pb.GenerateRequest:
    given: dict[str, Any] = {"adapter": None, "sampling": None, "add_special_tokens": None}
    return generate_request(prompt, **(given | values))


def refused(prompt: Any, field: str, **values: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        request(prompt, **values)
    assert [violation.field for violation in caught.value.field_violations] == [field]
    assert caught.value.reason == "INVALID_PARAMETER"
    return caught.value


class TestPrompt:
    def test_kinds(self) -> None:
        assert request("Hello").text == "Hello"
        assert request([1, 2, 3]).token_ids.ids == [1, 2, 3]
        assert request((0,)).token_ids.ids == [0]
        chat = request([ChatMessage("system", "be kind"), ChatMessage("user", "Hello")]).chat
        assert [(m.role, m.content) for m in chat.messages] == [
            (pb.CHAT_ROLE_SYSTEM, "be kind"),
            (pb.CHAT_ROLE_USER, "Hello"),
        ]

    def test_chat_with_options(self) -> None:
        prompt = ChatPrompt(
            [
                ChatMessage("user", "2 + 2?", name="ada"),
                ChatMessage("assistant", tool_calls=[ToolCall(id="c1", name="add", arguments_json='{"a": 2}')]),
                ChatMessage("tool", "4", tool_call_id="c1"),
            ],
            tools=[Tool(name="add", description="adds", parameters={"type": "object"})],
            tool_choice="add",
            enable_thinking=False,
        )
        chat = request(prompt).chat
        assert chat.messages[0].name == "ada"
        assert not chat.messages[1].HasField("content")
        assert chat.messages[1].tool_calls[0].arguments_json == '{"a": 2}'
        assert chat.messages[2].tool_call_id == "c1"
        assert chat.tools[0].parameters_json_schema == '{"type": "object"}'
        assert chat.tool_choice.function == "add"
        assert chat.HasField("enable_thinking") and not chat.enable_thinking
        assert not chat.HasField("add_generation_prompt")
        required = request(ChatPrompt([ChatMessage("user", "x")], tool_choice="required")).chat
        assert required.tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED

    @pytest.mark.parametrize(
        ("prompt", "field"),
        [
            ("", "prompt"),
            ([], "prompt"),
            (ChatPrompt([]), "prompt"),
            (b"bytes", "prompt"),
            (7, "prompt"),
            (None, "prompt"),
            ([1, "a"], "prompt[1]"),
            ([True], "prompt[0]"),
            ([1, ChatMessage("user", "x")], "prompt[1]"),
            ([ChatMessage("user", "x"), 1], "prompt[1]"),
            ([-1], "prompt"),
            ([2**32], "prompt"),
            ([ChatMessage("robot", "x")], "prompt.messages[0].role"),
            ([ChatMessage("user", 5)], "prompt.messages[0]"),  # type: ignore[arg-type]
            ("\ud800", "prompt"),
        ],
    )
    def test_refused(self, prompt: Any, field: str) -> None:
        refused(prompt, field)

    def test_too_large_a_message_is_not_sent(self) -> None:
        refused("x" * (4 * 1024 * 1024 + 1), "request")


class TestSampling:
    def test_fields_are_those_of_the_message(self) -> None:
        names = [field.name for field in fields(SamplingParams)]
        assert names == [field.name for field in pb.SamplingParams.DESCRIPTOR.fields]
        assert list(get_type_hints(SamplingFields)) == names
        hints = get_type_hints(SamplingParams)
        assert get_type_hints(SamplingFields) == hints

    def test_absent_is_not_zero(self) -> None:
        message = sampling_message(SamplingParams())
        assert not message.ListFields()
        message = sampling_message(SamplingParams(temperature=0, top_k=0, seed=0, ignore_eos=False, logprobs=0))
        assert {field.name for field, _ in message.ListFields()} == {
            "temperature",
            "top_k",
            "seed",
            "ignore_eos",
            "logprobs",
        }

    def test_every_field_arrives(self) -> None:
        message = sampling_message(
            SamplingParams(
                temperature=0.5,
                top_p=0.25,
                top_k=3,
                min_p=0.125,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=0.75,
                logit_bias={7: -1.0},
                seed=2**64 - 1,
                max_tokens=9,
                min_tokens=2,
                stop="END",
                stop_token_ids=[5],
                bad_words=["no"],
                ignore_eos=True,
                n=2,
                logprobs=1,
                prompt_logprobs=0,
                response_format=ResponseFormat(choice=["a", "b"]),
                truncate_prompt_tokens=100,
                soft_time_limit=1.5,
                include_stop=True,
                priority=-3,
                split_key="user-1",
            )
        )
        assert len(message.ListFields()) == len(fields(SamplingParams))
        assert message.stop == ["END"]
        assert dict(message.logit_bias) == {7: -1.0}
        assert message.seed == 2**64 - 1
        assert list(message.response_format.choice.choices) == ["a", "b"]
        assert (message.soft_time_limit.seconds, message.soft_time_limit.nanos) == (1, 500_000_000)
        assert message.priority == -3

    @pytest.mark.parametrize(
        "values",
        [
            {"temperature": "hot"},
            {"top_k": -1},
            {"seed": -1},
            {"seed": 2**64},
            {"max_tokens": 1.5},
            {"logit_bias": {"a": 1.0}},
            {"stop": [1]},
            {"soft_time_limit": float("nan")},
            {"soft_time_limit": True},
            {"split_key": 3},
        ],
    )
    def test_refused_by_name(self, values: dict[str, Any]) -> None:
        refused("x", f"sampling.{next(iter(values))}", sampling=SamplingParams(**values))

    def test_keywords_win(self) -> None:
        merged = merge_sampling(SamplingParams(temperature=1.0, top_k=5), {"temperature": 0, "max_tokens": 3})
        assert merged == SamplingParams(temperature=0, top_k=5, max_tokens=3)
        assert merge_sampling(None, {}) is None
        assert merge_sampling(None, {"n": None}) is None
        with pytest.raises(InvalidRequest, match="temprature"):
            merge_sampling(None, {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]

    @pytest.mark.parametrize("values", [{}, {"regex": "a", "choice": ["b"]}])
    def test_response_format_takes_one(self, values: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequest, match="exactly one"):
            ResponseFormat(**values)

    def test_response_formats(self) -> None:
        def convert(value: ResponseFormat) -> pb.ResponseFormat:
            return sampling_message(SamplingParams(response_format=value)).response_format

        assert convert(ResponseFormat(json_schema={"type": "null"})).json_schema == '{"type": "null"}'
        assert convert(ResponseFormat(regex="a+")).regex == "a+"
        assert convert(ResponseFormat(lark_grammar="start: /a/")).lark_grammar == "start: /a/"


class TestOthers:
    def test_adapter(self) -> None:
        assert not request("x").HasField("adapter")
        assert request("x", adapter="a@1").adapter == "a@1"
        refused("x", "adapter", adapter="")

    def test_batch_items(self) -> None:
        item = batch_item(4, "x", "bot")
        assert (item.item_id, item.request.adapter) == ("4", "bot")
        item = batch_item(4, BatchRequest([1], item_id="a", adapter="other", timeout=2), "bot")
        assert (item.item_id, item.request.adapter, item.timeout.seconds) == ("a", "other", 2)

    def test_tokenize(self) -> None:
        assert tokenize_request("", add_special_tokens=None, offsets=False).WhichOneof("prompt") == "text"
        assert tokenize_request([ChatMessage("user", "x")], add_special_tokens=None, offsets=True).include_offsets
        with pytest.raises(InvalidRequest, match="token ids already"):
            tokenize_request([1], add_special_tokens=None, offsets=False)
