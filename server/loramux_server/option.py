"""One setting: its type, its bounds, and how a value of any source is turned into it."""

import dataclasses
import re
from typing import Any

REQUIRED: Any = object()
_MAX_TEXT = 4096
_MAX_SHOWN = 100
# Neither survives on its way into file names, messages and log lines.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and the way out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting.

    Attributes:
        name: Field of `ServerConfig`; the flag is `--name-with-dashes`, the variable `LORAMUX_NAME`.
        kind: `str`, `int`, `float` or `bool`.
        default: Value when nobody sets it; `REQUIRED` must be set.
        help: One line.
        low: Least value.
        high: Greatest value.
        choices: Allowed values.
        negative: Flag that sets a boolean to false (`--no-...`), for those whose default is not false.
        multiple_of: Value must be a multiple of it.
    """

    name: str
    kind: type
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    negative: str | None = None
    multiple_of: int | None = None

    @property
    def flag(self) -> str:
        """Command-line flag."""
        return "--" + self.name.replace("_", "-")


def convert(option: Option, value: Any, source: str) -> Any:
    """Turn a value of any source into the option's type and check its bounds.

    Args:
        option: Which setting.
        value: As given: a text, or what YAML made of it.
        source: Flag, variable or line of the file, for errors.

    Raises:
        ConfigError: It does not fit.
    """
    if value is None:
        if option.default is None:
            return None
        raise ConfigError(f"{source} is empty; give a value or leave it out")
    if option.kind is bool:
        return _boolean(value, source)
    if option.kind is str:
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{source} is {shown(value)}; give a text that is not empty")
        if len(value) > _MAX_TEXT or _CONTROL.search(value):
            raise ConfigError(
                f"{source} is {shown(value)}; use at most {_MAX_TEXT} characters, none of them a control character"
            )
        if option.choices and value not in option.choices:
            raise ConfigError(f"{source} is {shown(value)}; use one of {', '.join(option.choices)}")
        return value
    number = _numeric(option, value, source)
    low = "" if option.low is None else f"{option.low:g}"
    high = "" if option.high is None else f"{option.high:g}"
    if number != number or not (option.low or 0) <= number <= (option.high or float("inf")):
        raise ConfigError(f"{source} is {shown(value)}; use {low} to {high}")
    if option.multiple_of is not None and number % option.multiple_of:
        raise ConfigError(f"{source} is {shown(value)}; use a multiple of {option.multiple_of}")
    return number


def _boolean(value: Any, source: str) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on"):
        return True
    if text in ("false", "0", "no", "off"):
        return False
    raise ConfigError(f"{source} is {shown(value)}; use true or false")


def _numeric(option: Option, value: Any, source: str) -> float:
    what = "a whole number" if option.kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{source} is {shown(value)}; give {what}")
    try:
        return option.kind(value) if isinstance(value, str) or option.kind is float else _whole(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{source} is {shown(value)}; give {what}") from None


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError
    return int(value)


def shown(value: object) -> str:
    """Render a value for an error: bounded, and in ASCII whatever it holds."""
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text)} characters)"
