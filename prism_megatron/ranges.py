"""Rules for the values of configuration fields, declared with each field."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

RULE, HINT, REPLACES = "rule", "hint", "replaces"
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_KEY = re.compile(r"[a-z]\w*(\.[a-z]\w*)*")
_MAX_FILE_NAME_BYTES = 255


class Rule(Protocol):
    """A rule of a field; ``str(rule)`` continues "must be" in an error."""

    def allows(self, value: Any) -> bool: ...


def setting(default: Any, rule: Rule | None = None, *, hint: str = "", replaces: str = "") -> Any:
    """Declare a field.

    Args:
        default: its value where nothing else is given.
        rule: the values that it may have.
        hint: the remedy in an error message.
        replaces: a field of the same section that the command line sets to 0 when it sets this one above 0.
    """
    return dataclasses.field(default=default, metadata=ruled(rule, hint, replaces))


def ruled(rule: Rule | None, hint: str = "", replaces: str = "") -> dict[str, Any]:
    """Return the metadata of such a field."""
    return {RULE: rule, HINT: hint, REPLACES: replaces}


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds, each included unless ``open``; also None, if ``off`` says what it means."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    off: str = ""

    def allows(self, value: float | None) -> bool:
        if value is None:
            return bool(self.off)
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            described = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        else:
            described = f"in {'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"
        if self.off:
            described = f"none ({self.off}) or {described}"
        return described


def at_least(low: float, off: str = "") -> Range:
    return Range(low, off=off)


def above(low: float, off: str = "") -> Range:
    return Range(low, open_low=True, off=off)


def between(low: float, high: float, ends: str = "[]") -> Range:
    """Return an interval; ``ends`` are its brackets, for example ``[)``."""
    return Range(low, high, open_low=ends[0] == "(", open_high=ends[1] == ")")


@dataclass(frozen=True)
class OneOf:
    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


def one_of(*values: Any) -> OneOf:
    return OneOf(values)


@dataclass(frozen=True)
class Some:
    """A list of any of ``values``, without repetition."""

    values: tuple[str, ...]

    def allows(self, value: list[str]) -> bool:
        return set(value) <= set(self.values) and len(set(value)) == len(value)

    def __str__(self) -> str:
        return f"a list of any of {', '.join(self.values)}, each once"


def some_of(*values: str) -> Some:
    return Some(values)


@dataclass(frozen=True)
class KeysRule:
    """A list of configuration keys, such as ``optimizer.lr``, without repetition."""

    def allows(self, value: list[str]) -> bool:
        return all(_KEY.fullmatch(key) for key in value) and len(set(value)) == len(value)

    def __str__(self) -> str:
        return "a list of configuration keys such as optimizer.lr, each once"


@dataclass(frozen=True)
class ColumnsRule:
    """A list of new names for columns, each ``name=column``."""

    def allows(self, value: list[str]) -> bool:
        return all(name.strip() and column.strip() for name, _, column in (entry.partition("=") for entry in value))

    def __str__(self) -> str:
        return "a list of name=column, such as messages=dialog"


@dataclass(frozen=True)
class PathRule:
    """The path of a file or folder; with ``inside``, a relative path that stays in its folder."""

    inside: bool = False
    optional: bool = False

    def allows(self, value: str) -> bool:
        parts = value.split("/")
        if any(len(part.encode(errors="replace")) > _MAX_FILE_NAME_BYTES for part in parts):
            return False
        if self.inside and any(not part.strip() or part in (".", "..") for part in parts):
            return False
        return (bool(value.strip()) or self.optional) and _UNPRINTABLE.search(value) is None

    def __str__(self) -> str:
        described = "a path without control characters"
        if self.inside:
            described = "a name, or names joined by /, none of them empty, '.' or '..'"
        return described + (", or empty" if self.optional else "") + f", each part at most {_MAX_FILE_NAME_BYTES} bytes"


PATH = PathRule()
OPTIONAL_PATH = PathRule(optional=True)
NAME = PathRule(inside=True)
KEYS = KeysRule()
COLUMNS = ColumnsRule()
