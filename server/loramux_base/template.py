"""Chat templates of the base model: Jinja in a sandbox, rendered as transformers' `apply_chat_template` does.

Templates come with the base only, never with an adapter or a request. Imports no torch and no transformers.
"""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_FILE_BYTES = 16 << 20
MAX_RENDERED_CHARS = 8 << 20


class TemplateError(ValueError):
    """A chat that the template does not take, or a template that cannot be used; the text names the way out."""


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's text for training; renders as its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The base's chat template.

    Attributes:
        digest: SHA-256 over the template sources, hex; of nothing if there is none.
    """

    digest: str
    _compiled: Mapping[str, jinja2.Template] = dataclasses.field(repr=False)
    _special_tokens: Mapping[str, str] = dataclasses.field(repr=False)

    @classmethod
    def from_directory(cls, directory: Path | str) -> "ChatTemplate":
        """Read `chat_template.jinja`, `additional_chat_templates/` and `tokenizer_config.json` of a checkpoint.

        Files win over the configuration's `chat_template`, which is one template or a list of named ones.

        Raises:
            TemplateError: A file cannot be parsed.
        """
        directory = Path(directory)
        config = _json(directory / "tokenizer_config.json")
        sources = _named(config.get("chat_template"))
        files = {}
        if (directory / "chat_template.jinja").is_file():
            files["default"] = _text(directory / "chat_template.jinja")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            files[path.stem] = _text(path)
        tokens = {**_json(directory / "special_tokens_map.json"), **config}
        return cls.from_sources(files or sources, {name: tokens.get(name) for name in _SPECIAL_TOKENS})

    @classmethod
    def from_sources(cls, sources: Mapping[str, str], special_tokens: Mapping[str, Any]) -> "ChatTemplate":
        """Compile templates.

        Args:
            sources: Name -> Jinja source; `default`, and `tool_use` for chats with tools.
            special_tokens: `bos_token` and so on -> the token, or a map with its `content`, or None.

        Raises:
            TemplateError: A source cannot be parsed.
        """
        environment = _environment()
        compiled = {}
        total = hashlib.sha256()
        for name, source in sorted(sources.items()):
            try:
                compiled[name] = environment.from_string(source)
            except jinja2.TemplateError as error:
                raise TemplateError(
                    f"the base's chat template {name!r} cannot be parsed: {error}; correct the checkpoint's template"
                ) from error
            for part in (name.encode(), source.encode()):
                total.update(len(part).to_bytes(8, "little") + part)
        tokens = {}
        for name, token in special_tokens.items():
            content = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(content, str):
                tokens[name] = content
        return cls(digest=total.hexdigest(), _compiled=compiled, _special_tokens=tokens)

    @property
    def available(self) -> bool:
        """Whether the base has a chat template at all."""
        return bool(self._compiled)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> str:
        """Render a chat.

        Args:
            messages: Plain data: `role`, `content`, and what else the template reads; None values are dropped.
            tools: JSON schemas of functions.
            add_generation_prompt: End with the header of the assistant's turn.
            max_chars: Most characters of output.

        Raises:
            TemplateError: No template, no messages, roles that the template refuses, or too long an output.
        """
        template = self._choose(tools)
        if not messages:
            raise TemplateError("the chat is empty; send at least one message")
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(
                messages=[_prepared(message) for message in messages],
                tools=None if tools is None else [_plain(tool) for tool in tools],
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                size += len(piece)
                if size > max_chars:
                    raise TemplateError(f"the rendered chat has more than {max_chars} characters; send a shorter one")
                pieces.append(piece)
        except jinja2.TemplateError as error:
            reason = ascii(error.message or type(error).__name__)[1:-1][:200]
            raise TemplateError(
                f"the base's chat template refuses this chat: {reason}; check the roles, their order and the content"
            ) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            # What template code raises when a message is not of the shape that it expects.
            raise TemplateError(
                "the base's chat template cannot render this chat; check that every message has the fields and types "
                "that it expects"
            ) from error
        return "".join(pieces)

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if not self._compiled:
            raise TemplateError("this base has no chat template; send the prompt as text or token ids")
        if tools is not None and "tool_use" in self._compiled:
            return self._compiled["tool_use"]
        if "default" in self._compiled:
            return self._compiled["default"]
        if len(self._compiled) == 1:
            return next(iter(self._compiled.values()))
        raise TemplateError("the base has several chat templates and none is named 'default'; name one so")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML and sorts keys; models were trained on plain JSON in the caller's order.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    # Templates read an earlier turn's reasoning under one of two names.
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy out of plain JSON types, so that the template can reach no object of ours."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TemplateError(f"a message holds a {type(value).__name__}; messages are strings, numbers, lists and maps")


def _named(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
        if all(isinstance(text, str) for pair in named.items() for text in pair):
            return {str(name): str(template) for name, template in named.items()}
    raise TemplateError("tokenizer_config.json: chat_template must be a string or a list of {name, template}")


def _text(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise TemplateError(f"{path.name} has more than {_MAX_FILE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path.name} is not UTF-8") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TemplateError(f"{path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise TemplateError(f"{path.name} must hold an object")
    return value
