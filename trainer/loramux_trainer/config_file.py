"""Reads a run's configuration: YAML, then `-o key=value` overrides, then strict validation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

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


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a configuration.

    Args:
        path: YAML file; relative paths in it are relative to its directory.
        overrides: `lora.r=32`, each with a YAML value; later ones win. Paths here are relative to the working
            directory.

    Raises:
        ConfigError: Unreadable file, unknown or wrong setting; the text names file and setting.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: has more than {MAX_BYTES} bytes; this is no configuration")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    value = _parse(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold settings, `base: ...` and so on")
    _anchor(value, path.absolute().parent)
    for override in overrides:
        _apply(value, override)
    try:
        return RunConfig.model_validate(value)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_described(item)}" for item in error.errors())) from error


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{where}: {getattr(error, 'problem', None) or error}") from error


def _anchor(value: dict[str, Any], directory: Path) -> None:
    """Make the file's paths absolute, so that a run does not depend on where it was started."""
    for name in ("base", "output"):
        if isinstance(value.get(name), str):
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
        raise ConfigError(f"-o {override}: write it as section.setting=value, for example -o lora.r=32")
    new = _parse(text, f"-o {override}")
    for key in keys[:-1]:
        inner = value.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"-o {override}: {key} is no section")
        value = inner
    if keys in (["data", "train"], ["data", "validation"]) and isinstance(new, str):
        new = [new]
    value[keys[-1]] = new


def _described(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "settings"
    if item["type"] == "extra_forbidden":
        return f"{path}: there is no such setting"
    if item["type"] == "missing":
        return f"{path}: is missing"
    given = "" if isinstance(item["input"], dict) else f", got {str(item['input'])[:80]!r}"
    return f"{path}: {item['msg'].removeprefix('Value error, ')}{given}"
