r"""PEFT's `rank_pattern` and `alpha_pattern`: regular expressions over module paths, written by the adapter's author.

PEFT takes the value of the first pattern for which `(.*\.)?(pattern)$` matches the module's path. A pattern is text
from a tenant and is evaluated in the engine's process, so what could backtrack for long is refused: the number of ways
in which the patterns of one adapter can match is bounded from their syntax, before any of them is used.
"""

import dataclasses
import re
import warnings
from typing import Any

from loramux_base.adapter_error import incompatible, shown
from loramux_base.shapes import MODULE_PARENTS

# Paths written out in full are all there is in most files: they are looked up instead of matched, which gives the
# same answer, since every word of such a pattern is a whole word of the paths that it is compared with.
_PLAIN = re.compile(r"(?:(?:model\.)?layers\.[0-9]{1,5}\.)?(?:self_attn\.|mlp\.)?(?:" + "|".join(MODULE_PARENTS) + r")")
_MAX_WAYS = 1 << 13
_MAX_REGEXES = 256
_LONGEST = 64
_MAX_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class Patterns:
    """An ordered map from pattern to number.

    Attributes:
        field: Configuration key that it came from.
        items: (pattern, number) in file order.
    """

    field: str = ""
    items: tuple[tuple[str, float], ...] = ()
    _plain: dict[str, int] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)
    _regexes: list[tuple[int, re.Pattern[str]]] = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=list
    )
    _found: dict[str, float | None] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Compile the patterns.

        Raises:
            AdapterFormatError: A pattern is not a regular expression of the allowed kind.
        """
        ways = 0
        for index, (pattern, _) in enumerate(self.items):
            if _PLAIN.fullmatch(pattern):
                self._plain[pattern] = index
                continue
            cost, regex = _compile(self.field, pattern)
            ways += cost
            if ways > _MAX_WAYS or len(self._regexes) >= _MAX_REGEXES:
                raise incompatible(
                    self.field,
                    f"{self.field}: the regular expressions up to {shown(pattern)} could backtrack for too long; "
                    "use fewer of them, with fewer repeats, or write module paths out in full",
                )
            self._regexes.append((index, regex))

    def find(self, module_path: str) -> float | None:
        """The number of the first pattern that matches, or None; matched once a path."""
        if module_path not in self._found:
            self._found[module_path] = self._find(module_path)
        return self._found[module_path]

    def _find(self, module_path: str) -> float | None:
        parts = module_path.split(".")
        suffixes = (".".join(parts[start:]) for start in range(len(parts)))
        first = min((self._plain[suffix] for suffix in suffixes if suffix in self._plain), default=len(self.items))
        for index, regex in self._regexes:
            if index > first:
                break
            if regex.match(module_path):
                first = index
                break
        return self.items[first][1] if first < len(self.items) else None


def _compile(field: str, pattern: str) -> tuple[int, re.Pattern[str]]:
    if len(pattern) > _MAX_LENGTH:
        raise incompatible(field, f"{field} has a pattern of {len(pattern)} characters; at most {_MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Alone first: "a)|(b" is only a regular expression once it stands inside the parentheses.
            tree = re._parser.parse(pattern)  # type: ignore[attr-defined]
            cost = _ways(field, pattern, tree)
            return cost, re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise incompatible(field, f"{field}: {shown(pattern)} is not a regular expression") from error


def _ways(field: str, pattern: str, tree: Any) -> int:
    """Upper bound of the ways in which a parsed pattern can be tried at one place of a module path."""
    total = 1
    for op, argument in tree:
        name = str(op)
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = argument
            inner = _ways(field, pattern, body)
            if inner > 1 and int(high) > 1:
                raise incompatible(field, f"{field}: {shown(pattern)} repeats a repeat or a choice; write it simpler")
            total *= min(int(high), _LONGEST) - min(int(low), _LONGEST) + inner
        elif name == "SUBPATTERN":
            total *= _ways(field, pattern, argument[3])
        elif name == "BRANCH":
            total *= sum(_ways(field, pattern, branch) for branch in argument[1])
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            raise incompatible(field, f"{field}: {shown(pattern)} uses {name.lower()}, which is not taken")
    return total
