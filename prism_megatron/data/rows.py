"""One row of a data file, the keys that readers need, and the error about many bad rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError
from prism_megatron.sections import DatasetConfig

Trace = Callable[[str], None]  # gets the source of a row before it is worked on

_QUOTED_FAULTS = 5


def no_trace(source: str) -> None:
    """A trace that does nothing."""


@dataclass(frozen=True)
class Columns:
    """The keys a reader uses. Of each tuple in ``needed`` a parquet file must have one."""

    needed: tuple[tuple[str, ...], ...]
    others: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [*(name for names in self.needed for name in names), *self.others]


@dataclass(frozen=True)
class Row:
    """One row and where it is from: ``source`` ("sft.jsonl, line 3") is quoted in every error about it."""

    fields: Mapping[str, Any]
    file: Path
    number: int
    source: str
    image_root: str = ""  # the folder that paths of images start from; empty: the file's


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading data files, as ``sections.DatasetConfig`` has them. Without ``cache`` it is temporary."""

    cache: Path | None = None
    skip_bad_rows: bool = False
    max_bad_fraction: float = 0.0
    check_images_max_rows: int = 20_000
    columns: tuple[str, ...] = ()
    image_root: str = ""

    @classmethod
    def from_config(cls, dataset: DatasetConfig, cache: Path | None) -> ReadOptions:
        return cls(
            cache=cache,
            skip_bad_rows=dataset.bad_rows == "skip",
            max_bad_fraction=dataset.max_bad_fraction,
            check_images_max_rows=dataset.check_images_max_rows,
            columns=tuple(dataset.columns),
            image_root=dataset.image_root,
        )

    def renamed(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of a row under the names that readers know: each of ``columns`` is "name=column"."""
        pairs = [column.partition("=")[::2] for column in self.columns]
        return {**fields, **{name: fields.get(column) for name, column in pairs}} if pairs else fields

    def stored_names(self, names: Sequence[str]) -> list[str]:
        """Names in the file of the columns that readers know as ``names``."""
        renames = dict(column.split("=", 1) for column in self.columns)
        return [renames.get(name, name) for name in names]


def raise_faults(faults: Sequence[str], count: int) -> None:
    """Raise UserError, if ``faults`` of ``count`` rows there are, that quotes the first and counts all."""
    if len(faults) > 1:
        quoted = "".join(f"\n  {fault}" for fault in faults[:_QUOTED_FAULTS])
        more = f"\n  ... and {len(faults) - _QUOTED_FAULTS} more" if len(faults) > _QUOTED_FAULTS else ""
        raise UserError(f"{len(faults)} of {count} rows cannot be used, correct or drop them:{quoted}{more}")
    if faults:
        raise UserError(faults[0])


def required(fields: Mapping[str, Any], keys: Sequence[str], source: str) -> Any:
    """The value of the first of ``keys`` that the row has."""
    for key in keys:
        if fields.get(key) is not None:
            return fields[key]
    raise UserError(f"{source}: needs the key {' or '.join(map(repr, keys))}, has {sorted(map(str, fields))}")


def from_json(value: Any) -> Any:
    """A nested column, also where it was stored as JSON text; anything else unchanged."""
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def json_object(text: bytes, source: str) -> Mapping[str, Any]:
    """The JSON object in ``text``. Raises UserError, quoting ``source``, for anything else."""
    fields = parse_json(text, source)
    if not isinstance(fields, dict):
        raise UserError(f"{source}: a row is a JSON object, got {type(fields).__name__}")
    return fields


def parse_json(text: bytes, source: str) -> Any:
    """The JSON value in UTF-8 ``text``. Raises UserError, quoting ``source``, where there is none."""
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as fault:
        raise UserError(f"{source}: not UTF-8 ({fault}); convert the file, with iconv or recode") from fault
    except RecursionError as fault:
        raise UserError(f"{source}: JSON nested too deeply; correct or drop the row") from fault
    except ValueError as fault:
        raise UserError(f"{source}: not JSON ({fault}); the file may be cut off, fetch or write it again") from fault
