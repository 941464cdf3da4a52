import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loramux_base.template import ChatTemplate, TemplateError
from tests.support.tiny_tokenizers import byte_level, write_tokenizer

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{%- set ns.last = loop.index0 %}{%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
{{- '' if ns.last < 0 else '<!-- ' ~ ns.last ~ ' -->' }}
"""  # noqa: E501 - Jinja is as wide as its authors write it
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message and message.tool_calls|length != 1 %}
        {{- raise_exception("This model only supports single tool-calls at once!") }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501 - Jinja is as wide as its authors write it
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{'<start_of_turn>model\n'}}
{% endif %}
"""  # noqa: E501 - Jinja is as wide as its authors write it
TRAINING = """\
{% for message in messages %}
    {% if message.role == "skip" %}{% continue %}{% endif %}
    {% set mark = "@" %}
    {% if message.role == "assistant" %}
    {% generation %}{{ mark }}{{ loop.index }}{{ message.reasoning_content or "-" }}{{ message["thinking"] or "-" }} {{ message.content }}{% endgeneration %}
    {% else %}
  {{ message.content }}{{ eos_token }}
    {% endif %}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
"""  # noqa: E501 - Jinja is as wide as its authors write it
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "gemma": GEMMA, "training": TRAINING}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Gets the <weather> & "wind" of 北京',
            "parameters": {"z": 1, "a": [True, None, 1.5]},
        },
    }
]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Hi <there> & you "}],
    "system": [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "你好 😀"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": None},
        {"role": "user", "content": "c\n\nd"},
    ],
    "wrong order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "calls": [
        {"role": "user", "content": "w?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "n": 1}}}
            ],
        },
        {"role": "tool", "content": "sunny"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " x "}, {"type": "image"}]}],
    "reasoning": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "because"},
        {"role": "skip", "content": "no"},
        {"role": "assistant", "content": "c", "thinking": "hm"},
    ],
    "no content": [{"role": "user", "content": None}],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    return write_tokenizer(tmp_path_factory.mktemp("base"), byte_level(), tokenizer_config=config)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(directory: Path, name: str, chat: str) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATES[name])
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    ours = ChatTemplate.from_directory(directory)
    refused = 0
    for tools in (None, TOOLS, []):
        for prompt in (True, False):
            try:
                wanted = theirs.apply_chat_template(
                    CHATS[chat], tools=tools, tokenize=False, add_generation_prompt=prompt
                )
            except Exception:  # noqa: BLE001 -- jinja's errors and whatever its code raises
                refused += 1
                with pytest.raises(TemplateError):
                    ours.render(CHATS[chat], tools=tools, add_generation_prompt=prompt)
            else:
                assert ours.render(CHATS[chat], tools=tools, add_generation_prompt=prompt) == wanted
    must_refuse = {("gemma", "wrong order"), ("gemma", "system"), ("qwen", "parts")}
    assert refused == 6 if (name, chat) in must_refuse else refused in (0, 6)


def test_wrong_roles_name_the_way_out() -> None:
    template = ChatTemplate.from_sources({"default": GEMMA}, {})
    with pytest.raises(TemplateError, match="must alternate.*check the roles, their order"):
        template.render(CHATS["wrong order"])
    with pytest.raises(TemplateError, match="at least one message"):
        template.render([])


def test_the_date_is_todays() -> None:
    rendered = ChatTemplate.from_sources({"default": LLAMA}, {"bos_token": "<s>"}).render(CHATS["one"])
    assert datetime.datetime.now().strftime("%d %b %Y") in rendered


@pytest.mark.parametrize("value", ["default here", [{"name": "default", "template": "default here"}]])
def test_template_in_the_configuration(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    template = ChatTemplate.from_directory(tmp_path)
    assert template.available
    assert template.render(CHATS["one"]) == "default here"
    (tmp_path / "chat_template.jinja").write_text("file")
    other = ChatTemplate.from_directory(str(tmp_path))
    assert other.render(CHATS["one"]) == "file"
    assert template.digest != other.digest


def test_named_templates(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    template = ChatTemplate.from_directory(tmp_path)
    assert (template.render(CHATS["one"]), template.render(CHATS["one"], tools=TOOLS)) == ("plain", "tools")
    with pytest.raises(TemplateError, match="none is named 'default'"):
        ChatTemplate.from_sources({"a": "1", "b": "2"}, {}).render(CHATS["one"])


def test_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<old>", "eos_token": {"content": "</s>"}})
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}")
    assert ChatTemplate.from_directory(tmp_path).render(CHATS["one"]) == "<s>|</s>|False"


def test_no_template(tmp_path: Path) -> None:
    template = ChatTemplate.from_directory(tmp_path)
    assert not template.available
    with pytest.raises(TemplateError, match="send the prompt as text"):
        template.render(CHATS["one"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set x = messages[0].update({'role': 1}) %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        print(ChatTemplate.from_sources({"default": source}, {}).render(CHATS["one"]))


def test_output_is_bounded() -> None:
    template = ChatTemplate.from_sources({"default": "{% for i in range(1000) %}{{ 'x' * 100 }}{% endfor %}"}, {})
    with pytest.raises(TemplateError, match="more than 5000 characters"):
        template.render(CHATS["one"], max_chars=5000)


def test_broken_templates(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="cannot be parsed"):
        ChatTemplate.from_sources({"default": "{% if %}"}, {})
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TemplateError, match="valid JSON"):
        ChatTemplate.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(TemplateError, match="must be a string or a list"):
        ChatTemplate.from_directory(tmp_path)


def test_objects_do_not_reach_the_template() -> None:
    template = ChatTemplate.from_sources({"default": "{{ messages[0].content }}"}, {})
    with pytest.raises(TemplateError, match="holds a Path|PosixPath"):
        template.render([{"role": "user", "content": Path("x")}])
