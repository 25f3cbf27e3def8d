"""Overrides of a configuration and its checks: each field's rule first, then the values that depend on each other."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from prism_megatron.errors import UserError
from prism_megatron.ranges import HINT, REPLACES, RULE

MISSING: Any = "???"  # a value that a recipe or the command line must give; OmegaConf writes it so too
# Settings that were 0 in earlier versions where they are None now. 0 is still read as None.
ZERO_WAS_OFF = frozenset(
    {
        *("num_candidates", "dual_clip", "importance_cap", "overlong_buffer_tokens", "replay.prompts"),
        *("discriminator.max_branch_tokens", "model.max_hidden_size", "eval.num_questions"),
        *("rollout.timeout_seconds", "rollout.tensor_model_parallel_size", "rollout.max_logprob_abs_diff"),
        *("rollout.guard_interval", "rollout.guard_max_logprob_diff"),
    }
)
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}
_NONE = ("none", "null")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of words"}


class Section:
    """A dataclass of settings. Its fields obey their rules when ``check`` is called."""

    def check(self, at: str) -> None:
        """Raise UserError for values that contradict each other; ``at`` precedes field names ("optimizer.")."""

    def ignores(self, key: str) -> bool:
        """Return whether ``key`` is accepted without effect, since earlier versions had it here."""
        return False


def apply_overrides[ConfigT: Section](config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """Return a copy with dotted overrides such as ``optimizer.lr=1e-5``, checked.

    Raises UserError naming the key, the value, the rule and a remedy, also for values that are missing.
    """
    changed = copy.deepcopy(config)
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form key=value, for example optimizer.lr=1e-5")
        if changed.ignores(key):
            _note(f"{key} has no effect in this stage and is ignored")
            continue
        section, field = _find(changed, key)
        setattr(section, field.name, _parsed(text, field, override, getattr(section, field.name)))
        replaced = field.metadata.get(REPLACES)
        if replaced and getattr(section, field.name) and f"{key.removesuffix(field.name)}{replaced}" not in given:
            setattr(section, replaced, 0)
    for key, value in flat(changed).items():
        if read_old(key, value) is not value:
            section, field = _find(changed, key)
            setattr(section, field.name, read_old(key, value))
    missing = sorted(key for key, value in flat(changed).items() if value == MISSING)
    if missing:
        raise UserError(f"recipe leaves {', '.join(missing)} unset; give {missing[0]}=VALUE on the command line")
    check(changed, config)
    return changed


@functools.cache
def _note(text: str) -> None:
    """Print a note on the main rank, once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def read_old(key: str, value: Any) -> Any:
    """Translate the value of a setting from the representation of earlier versions."""
    return None if key in ZERO_WAS_OFF and value == 0 else value


def fill(config: Section, values: Mapping[Any, Any]) -> None:
    """Set fields of a configuration from nested mappings, as in its YAML file. Raises UserError for unknown keys."""
    _fill(config, config, values, "")


def _fill(config: Section, section: Section, values: Mapping[Any, Any], at: str) -> None:
    fields = set(vars(section))
    for name, value in values.items():
        key = f"{at}{name}"
        current = getattr(section, name) if name in fields else None
        if isinstance(current, Section) and isinstance(value, Mapping):
            _fill(config, current, value, f"{key}.")
        elif isinstance(current, Section):
            raise UserError(f"{key} is a group of keys, not a value; got {value!r}")
        elif name in fields:
            setattr(section, name, value)
        elif not all(map(config.ignores, _keys(key, value))):
            where = at.removesuffix(".") or "the configuration"
            raise UserError(f"unknown key {key!r}: {where} has {', '.join(sorted(fields))}")


def _keys(key: str, value: Any) -> Iterator[str]:
    """Yield the dotted keys of the values in nested mappings under ``key``."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _keys(f"{key}.{name}", inner)
    else:
        yield key


def check(config: Section, recipe: Section | None = None) -> None:
    """Check all fields and sections. ``recipe`` has the values before overrides, which errors suggest."""
    _check_fields(config, recipe, "")
    _check_sections(config, "")


def _check_fields(section: Any, recipe: Any, at: str) -> None:
    for field in dataclasses.fields(section):
        value, before = getattr(section, field.name), getattr(recipe, field.name, None)
        key, (kind, is_optional) = f"{at}{field.name}", _kind(field)
        if dataclasses.is_dataclass(value):
            _check_fields(value, before, f"{key}.")
            continue
        if kind is float and type(value) is int:
            value = float(value)
            setattr(section, field.name, value)
        is_kind = type(value) is kind and not (kind is list and any(type(item) is not str for item in value))
        if not is_kind and not (is_optional and value is None):
            raise UserError(f"{key} takes {_kinds(field)}, got {value!r}")
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


def flat(section: Any, at: str = "") -> dict[str, Any]:
    """Return all values of a configuration by dotted key."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{at}{field.name}.")
        else:
            values[at + field.name] = value
    return values


def _find(config: Section, key: str) -> tuple[Any, dataclasses.Field[Any]]:
    """Return the section of ``key`` and its field there. Raises UserError if there is none."""
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
    """Convert the text of an override to the field's type. A list is written ``[a,b]`` or ``a,b``."""
    kind, is_optional = _kind(field)
    if is_optional and text.strip().lower() in _NONE:
        return None
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
            f"override {override!r} is refused: {key} takes {_kinds(field)}, got {text!r}; for example {key}={example}"
        ) from None


def _kind(field: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """Return a field's type, without its items' type or None, and whether it may be None."""
    assert not isinstance(field.type, str), "configurations keep their annotations as types"
    if getattr(field.type, "__origin__", None) is list:
        return list, False
    if NoneType in (kinds := get_args(field.type)):
        return next(kind for kind in kinds if kind is not NoneType), True
    return field.type, False


def _kinds(field: dataclasses.Field[Any]) -> str:
    kind, is_optional = _kind(field)
    return f"{_KINDS[kind]} or none" if is_optional else _KINDS[kind]


def _text(value: Any) -> str:
    """Write a value as on the command line; a text in quotes, so that invisible characters are displayed."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool | NoneType) else repr(value)
