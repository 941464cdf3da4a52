"""Reads a run's configuration: YAML, then `-o key=value` overrides, then strict validation."""

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from loramux_base.embedded import DEMO_NAME, EmbeddedBaseMissing, embedded_base
from loramux_trainer.config import RunConfig
from loramux_trainer.errors import ConfigError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without its two traps: `2e-4` is a number here, and a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is no text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar_of(self, node: yaml.Node) -> Any:
        """A number or date; PyYAML lets the errors of Python's own constructors through."""
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except (ValueError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {kind}; put text in quotes", node.start_mark
            ) from error


for _kind in ("int", "float", "timestamp", "bool"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_scalar_of)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def demo_base(setting: str) -> Path:
    """Directory of the embedded base, for a setting that names it `demo`.

    Args:
        setting: Names the setting in errors.

    Raises:
        ConfigError: There is none; says how to get it.
    """
    try:
        return embedded_base()
    except EmbeddedBaseMissing as error:
        raise ConfigError(f"{setting}: {DEMO_NAME} {error}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: YAML file; relative paths in it are relative to its directory. A base `demo` is the embedded one.
        overrides: `lora.r=32`, each with a YAML value; later ones win. Paths here are relative to the working
            directory.

    Raises:
        ConfigError: Unreadable file, unknown or wrong setting; the text names file and setting.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: is no regular file; give the YAML file of the run")
        if found.st_size > MAX_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_BYTES} bytes; this is no configuration")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # not UTF-8, or a name with NUL
        raise ConfigError(f"{path}: cannot be read ({error}); it must be UTF-8") from error
    value = _parse(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold settings, `base: ...` and so on")
    _anchor(value, path.absolute().parent)
    for override in overrides:
        _apply(value, override)
    if value.get("base") == DEMO_NAME:
        value["base"] = str(demo_base(f"{path}: base"))
    try:
        return RunConfig.model_validate(value)
    except pydantic.ValidationError as error:
        items = error.errors()
        places = {item["loc"][: len(item["loc"]) - 1] for item in items}
        # A list all of whose entries are wrong is reported as too short as well.
        lines = [_described(item) for item in items if item["type"] != "too_short" or item["loc"] not in places]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}{where}: {problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: is nested too deeply; this is no configuration") from error


def _anchor(value: dict[str, Any], directory: Path) -> None:
    """Make the file's paths absolute, so that a run does not depend on where it was started."""
    for name in ("base", "output"):
        if isinstance(value.get(name), str) and (name, value[name]) != ("base", DEMO_NAME):
            value[name] = str(directory / value[name])
    data = value.get("data")
    if isinstance(data, dict):
        for name in ("train", "validation"):
            entry = data.get(name)
            if isinstance(entry, str):
                data[name] = [str(directory / entry)]
            elif isinstance(entry, list):
                data[name] = [str(directory / item) if isinstance(item, str) else item for item in entry]


def _apply(value: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"-o {override[:_SHOWN_CHARACTERS]}: write it as section.setting=value, for example -o lora.r=32"
        )
    source = f"-o {override[:_SHOWN_CHARACTERS]}"
    new = _parse(text, source)
    for key in keys[:-1]:
        inner = value.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{source}: {key} is no section")
        value = inner
    if keys in (["data", "train"], ["data", "validation"]) and isinstance(new, str):
        new = [new]
    value[keys[-1]] = new


_WORDS = {
    "extra_forbidden": "there is no such setting",
    "missing": "is missing",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "string_unicode": "must be text; this is half a surrogate pair",
    "string_too_short": "must not be empty",
    "path_type": "must be a path",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be a section with settings",
}
"""Our words for errors of pydantic that speak of Python's types."""
_SHOWN_CHARACTERS = 60


def _described(item: Any) -> str:
    """One line for an error of pydantic: setting, what it must be, and what was given."""
    path = ".".join(str(part) for part in item["loc"]) or "settings"
    message = _WORDS.get(item["type"], item["msg"].removeprefix("Value error, ").replace("Input should", "must", 1))
    section = isinstance(item["input"], dict)
    if item["type"] in ("extra_forbidden", "missing") or (section and item["type"] == "value_error"):
        return f"{path}: {message}"
    if item["input"] is None:
        return f"{path}: {message}, it is empty"
    given = "a section" if section else repr(str(item["input"])[:_SHOWN_CHARACTERS])
    return f"{path}: {message}, got {given}"
