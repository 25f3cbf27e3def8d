"""Overrides of a configuration, and its checks: every field by its own rule, then those that belong together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prism_megatron.errors import UserError
from prism_megatron.ranges import HINT, REPLACES, RULE

MISSING: Any = "???"  # a value that a recipe or the command line must give; OmegaConf writes it so too
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of words"}


class Section:
    """A dataclass of settings. All of its fields obey their rules before ``check`` is called."""

    def check(self, at: str) -> None:
        """Refuse values that do not go together; ``at`` comes before a field's name in an error ("optimizer.")."""


def apply_overrides[ConfigT: Section](config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """Apply dotted overrides such as ``optimizer.lr=1e-5``, then check that all values are set and make sense.

    Raises UserError naming the key, the value, what is right and a remedy.
    """
    changed = copy.deepcopy(config)
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form key=value, for example optimizer.lr=1e-5")
        section, field = _find(changed, key)
        setattr(section, field.name, _parsed(text, field, override, getattr(section, field.name)))
        replaced = field.metadata.get(REPLACES)
        if replaced and getattr(section, field.name) and f"{key.removesuffix(field.name)}{replaced}" not in given:
            setattr(section, replaced, 0)
    missing = sorted(key for key, value in _values(changed) if value == MISSING)
    if missing:
        raise UserError(f"recipe leaves {', '.join(missing)} unset; give {missing[0]}=VALUE on the command line")
    check(changed, config)
    return changed


def fill(section: Section, values: Mapping[Any, Any], at: str = "") -> None:
    """Set fields of a configuration from nested mappings, as in its YAML file. Raises UserError for unknown keys."""
    fields = set(vars(section))
    for key, value in values.items():
        if key not in fields:
            where = at.removesuffix(".") or "the configuration"
            raise UserError(f"unknown key {at + str(key)!r}: {where} has {', '.join(sorted(fields))}")
        current = getattr(section, key)
        if not isinstance(current, Section):
            setattr(section, key, value)
        elif isinstance(value, Mapping):
            fill(current, value, f"{at}{key}.")
        else:
            raise UserError(f"{at}{key} is a group of keys, not a value; got {value!r}")


def check(config: Section, recipe: Section | None = None) -> None:
    """Refuse values that break their field's rule or do not go together. ``recipe`` has the values before overrides."""
    _check_fields(config, recipe, "")
    _check_sections(config, "")


def _check_fields(section: Any, recipe: Any, at: str) -> None:
    for field in dataclasses.fields(section):
        value, before = getattr(section, field.name), getattr(recipe, field.name, None)
        key, kind = f"{at}{field.name}", _kind(field)
        if dataclasses.is_dataclass(value):
            _check_fields(value, before, f"{key}.")
            continue
        if kind is float and type(value) is int:
            value = float(value)
            setattr(section, field.name, value)
        if type(value) is not kind or (kind is list and any(type(item) is not str for item in value)):
            raise UserError(f"{key} takes {_KINDS[kind]}, got {value!r}")
        rule = field.metadata[RULE]
        if rule is None or rule.allows(value):
            continue
        hint = field.metadata[HINT]
        if not hint and before not in (None, MISSING) and before != value and rule.allows(before):
            hint = f"the recipe has {_text(before)}"
        raise UserError(f"{key} must be {rule}, got {_text(value)}" + (f"; {hint}" if hint else ""))


def _check_sections(section: Any, at: str) -> None:
    for field in dataclasses.fields(section):
        if isinstance(value := getattr(section, field.name), Section):
            _check_sections(value, f"{at}{field.name}.")
    section.check(at)


def _values(section: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section, with its dotted key."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{at}{field.name}.")
        else:
            yield f"{at}{field.name}", value


def _find(config: Section, key: str) -> tuple[Any, dataclasses.Field[Any]]:
    """The section that holds ``key``, and its field there."""
    section: Any = config
    *outer, last = key.split(".")
    for depth, part in enumerate([*outer, last]):
        fields = {f.name: f for f in dataclasses.fields(section)} if dataclasses.is_dataclass(section) else {}
        if part not in fields:
            where = ".".join(outer[:depth]) or "this recipe"
            raise UserError(f"unknown key {key!r}: {where} has {', '.join(sorted(fields)) or 'no keys'}")
        if depth < len(outer):
            section = getattr(section, part)
    if dataclasses.is_dataclass(value := getattr(section, last)):
        inside = dataclasses.fields(value)[0].name
        raise UserError(f"{key!r} is a group of keys, not a value; give one of them, for example {key}.{inside}=VALUE")
    return section, fields[last]


def _parsed(text: str, field: dataclasses.Field[Any], override: str, before: Any) -> Any:
    """The value that ``text`` is for a field. A text is taken as it stands, a list is ``[a,b]`` or ``a,b``."""
    kind = _kind(field)
    try:
        if kind is bool:
            return _BOOLEANS[text.strip().lower()]
        if kind is list:
            words = text.strip().removeprefix("[").removesuffix("]").split(",")
            return [word for each in words if (word := each.strip().strip("'\""))]
        return kind(text)
    except (ValueError, KeyError):
        example = "VALUE" if before == MISSING else _text(before)
        key = override.partition("=")[0]
        raise UserError(
            f"override {override!r} is refused: {key} takes {_KINDS[kind]}, got {text!r}; for example {key}={example}"
        ) from None


def _kind(field: dataclasses.Field[Any]) -> Any:
    assert not isinstance(field.type, str), "configurations keep their annotations as types"
    return list if getattr(field.type, "__origin__", None) is list else field.type


def _text(value: Any) -> str:
    """As the command line takes it; a text in quotes, which shows what is invisible."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else repr(value)
