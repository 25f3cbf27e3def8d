"""Rows of data files: JSON Lines, one JSON list, or parquet, in one file or many. Errors of many rows are one error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_megatron.data.sources import PARQUET, Data, data_files
from prism_megatron.errors import UserError

_BATCH_ROWS = 16  # so few that no column of a batch comes near 2 GiB, where Arrow cuts it and cannot convert it
_SHOWN_FAULTS = 5
_FOREIGN = {
    b"\xff\xfe": "UTF-16 text; write it as UTF-8",
    b"\xfe\xff": "UTF-16 text; write it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; decompress it",
    b"BZh": "compressed by bzip2; decompress it",
    b"\xfd7zXZ": "compressed by xz; decompress it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it",
    b"PK\x03\x04": "a zip archive; unpack it",
}


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


def read_rows[R](data: Data, columns: Columns, record_of: Callable[[Row], R]) -> list[R]:
    """``record_of`` each row of all files. Raises UserError that quotes the first bad rows and counts all."""
    records: list[R] = []
    faults: list[str] = []
    count = 0
    for file in data_files(data):
        before = count
        for number, source, fields in _raw_rows(file, columns):
            count += 1
            try:
                row = Row(_object(fields, source), file, number, source)
                records.append(record_of(row))
            except UserError as fault:
                faults.append(str(fault))
        if count == before:
            raise UserError(f"{file}: empty data set; check that the file was written to its end")
    raise_faults(faults, count)
    return records


def raise_faults(faults: Sequence[str], count: int) -> None:
    """Raise UserError, if ``faults`` of ``count`` rows there are, that quotes the first and counts all."""
    if len(faults) > 1:
        shown = "".join(f"\n  {fault}" for fault in faults[:_SHOWN_FAULTS])
        more = f"\n  ... and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise UserError(f"{len(faults)} of {count} rows cannot be used, correct or drop them:{shown}{more}")
    if faults:
        raise UserError(faults[0])


def parquet_footer(file: Path, columns: Columns) -> pq.FileMetaData:
    """What a parquet file says of itself. Raises UserError where it is none, empty or lacks one of ``columns``."""
    try:
        footer = pq.read_metadata(file)
        names = footer.schema.to_arrow_schema().names
    except (pa.ArrowException, OSError) as fault:
        raise UserError(f"{file}: not a parquet file ({fault}); the file may be cut off, fetch it again") from fault
    if missing := [" or ".join(among) for among in columns.needed if not set(among).intersection(names)]:
        raise UserError(f"{file}: column(s) {missing} missing, has {names}; add or rename them")
    if footer.num_rows == 0:
        raise UserError(f"{file}: empty data set; check the filter that wrote it")
    return footer


def is_parquet(file: Path) -> bool:
    """Whether a file says that it is parquet, by its first bytes or its name."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1" or file.suffix in PARQUET


def count_rows(data: Data, columns: Columns) -> int:
    """How many rows the files have. Of parquet only the footer is read, of JSON only the first row is parsed.

    Raises UserError for a file that lacks one of ``columns``.
    """
    count = 0
    for file in data_files(data):
        if is_parquet(file):
            count += parquet_footer(file, columns).num_rows
            continue
        rows = list(_raw_rows(file, columns))
        for _, source, fields in rows[:1]:
            first = _object(fields, source)
            for keys in columns.needed:
                required(first, keys, source)
        count += len(rows)
    return count


def required(fields: Mapping[str, Any], keys: Sequence[str], source: str) -> Any:
    """The value of the first of ``keys`` that the row has."""
    for key in keys:
        if fields.get(key) is not None:
            return fields[key]
    raise UserError(f"{source}: needs the key {' or '.join(map(repr, keys))}, has {sorted(map(str, fields))}")


def from_json(value: Any) -> Any:
    """A nested column, also where it was stored as JSON text; anything else as it is."""
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _raw_rows(file: Path, columns: Columns) -> Iterator[tuple[int, str, Any]]:
    """Number, source and content of each row; content is bytes where it is yet to be parsed as JSON."""
    if is_parquet(file):
        for number, fields in enumerate(_parquet_rows(file, columns)):
            yield number, f"{file}, row {number}", fields
        return
    with file.open("rb") as opened:
        start = opened.read(4096)
        for magic, what in _FOREIGN.items():
            if start.startswith(magic):
                raise UserError(f"{file}: {what}")
        if b"\0" in start:
            raise UserError(f"{file}: not UTF-8 text (it has zero bytes); write it as UTF-8 JSON Lines or as parquet")
        opened.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)
        if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            for number, fields in enumerate(_parsed(opened.read(), str(file))):
                yield number, f"{file}, row {number}", fields
            return
        # Lines end at "\n" and nowhere else: what str.splitlines cuts at may stand inside a string.
        for number, line in enumerate(opened, start=1):
            if line.strip():
                yield number, f"{file}, line {number}", line


def _parquet_rows(file: Path, columns: Columns) -> Iterator[Mapping[str, Any]]:
    names = parquet_footer(file, columns).schema.to_arrow_schema().names
    used = [name for name in columns.names if name in names]
    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            for batch in opened.iter_batches(_BATCH_ROWS, columns=used):
                for fields in batch.to_pylist():
                    yield fields
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as fault:
        raise UserError(f"{file}: cannot be read from row {number} on ({fault}); fetch or write it again") from fault


def _object(fields: Any, source: str) -> Mapping[str, Any]:
    if isinstance(fields, bytes):
        fields = _parsed(fields, source)
    if not isinstance(fields, dict):
        raise UserError(f"{source}: a row is a JSON object, got {type(fields).__name__}")
    return fields


def _parsed(text: bytes | str, source: str) -> Any:
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as fault:
        raise UserError(f"{source}: not UTF-8 ({fault}); convert the file, with iconv or recode") from fault
    except RecursionError as fault:
        raise UserError(f"{source}: JSON nested too deeply; correct or drop the row") from fault
    except ValueError as fault:
        raise UserError(f"{source}: not JSON ({fault}); the file may be cut off, fetch or write it again") from fault
