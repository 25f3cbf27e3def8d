"""Random access to the rows of a data file: JSON Lines and JSON lists where they are, parquet through an Arrow copy.

A JSON file is not copied: its table of rows says at which byte each one starts. The rows of a parquet file cannot be
read one by one, so they are written once to an Arrow file, which is memory-mapped. Neither decodes a row before it is
asked for, and nothing is resident but what was read last.
"""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from prism_megatron.data.rows import Columns, json_object, parse_json
from prism_megatron.data.sources import PARQUET
from prism_megatron.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# number: line, or row from 0, as errors name it. start, length: bytes of a JSON row; row of an Arrow file, 0.
LOCATION = np.dtype([("number", np.int32), ("start", np.int64), ("length", np.int32)])

_SCAN_BYTES = 1 << 26
_BATCH_BYTES = 1 << 25  # far below 2 GiB a column, where Arrow cuts a batch and cannot convert it
_MAX_BATCH_ROWS = 1024
_FOREIGN = {
    b"\xff\xfe": "UTF-16 text; write it as UTF-8",
    b"\xfe\xff": "UTF-16 text; write it as UTF-8",
    b"\x1f\x8b": "compressed by gzip; decompress it",
    b"BZh": "compressed by bzip2; decompress it",
    b"\xfd7zXZ": "compressed by xz; decompress it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; decompress it",
    b"PK\x03\x04": "a zip archive; unpack it",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', re.DOTALL)


class RowFile(Protocol):
    """An open data file."""

    def fields(self, start: int, length: int, source: str) -> Mapping[str, Any]:
        """The content of a row, by its LOCATION. Raises UserError that quotes ``source``."""
        ...


def is_parquet(file: Path) -> bool:
    """Tell if a file is parquet, by its first bytes or its name."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PAR1" or file.suffix in PARQUET


# JSON -----------------------------------------------------------------------------------------------------------------


class JsonFile:
    """The rows of a JSON file. Each is read at its position, so that processes may share what is open."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def fields(self, start: int, length: int, source: str) -> Mapping[str, Any]:
        return json_object(os.pread(self._file.fileno(), length, start), source)


def is_json_list(file: Path) -> bool:
    """Tell if a JSON file is one list, and not lines. Raises UserError for what is no UTF-8 text."""
    with file.open("rb") as opened:
        head = opened.read(4096)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{file}: {what}")
    if b"\0" in head:
        raise UserError(f"{file}: not UTF-8 text (it has zero bytes); write it as UTF-8 JSON Lines or as parquet")
    return head.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["


def json_locations(file: Path) -> np.ndarray:
    """LOCATION of each row of a JSON file, none of them parsed."""
    if file.stat().st_size == 0:
        return np.empty(0, LOCATION)
    if not is_json_list(file):
        return _lines(np.memmap(file, np.uint8, "r"))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _elements(content, file)


def _lines(content: np.ndarray) -> np.ndarray:
    """Lines that are not blank. They end at newlines only: what str.splitlines cuts at may stand inside a string."""
    scanned = range(0, len(content), _SCAN_BYTES)
    ends = [np.flatnonzero(content[low : low + _SCAN_BYTES] == ord("\n")) + low for low in scanned]
    last = [] if content[-1] == ord("\n") else [len(content)]
    stops = np.concatenate([*ends, np.array(last, np.int64)])
    begin = len(_BYTE_ORDER_MARK) if content[:3].tobytes() == _BYTE_ORDER_MARK else 0
    starts = np.concatenate([[begin], stops[:-1] + 1])
    lines = np.empty(len(stops), LOCATION)
    lines["number"], lines["start"], lines["length"] = np.arange(1, len(stops) + 1), starts, stops - starts
    first = content[np.minimum(starts, len(content) - 1)]
    suspects = np.flatnonzero((starts == stops) | np.isin(first, np.frombuffer(b" \t\r\n\v\f", np.uint8)))
    return np.delete(lines, [i for i in suspects if not content[starts[i] : stops[i]].tobytes().strip()])


def _elements(content: mmap.mmap, file: Path) -> np.ndarray:
    """Elements of the list that the file is."""
    begin = len(_BYTE_ORDER_MARK) if content[:3] == _BYTE_ORDER_MARK else 0
    found: list[tuple[int, int, int]] = []
    depth, start = 0, 0
    for token in _JSON_TOKEN.finditer(content, begin):
        kind = content[token.start()]
        if kind in b"[{":
            depth += 1
            if depth == 1:
                start = token.end()
        elif kind in b"]}" or (kind == ord(",") and depth == 1):
            depth -= kind != ord(",")
            if depth == 0 or kind == ord(","):
                found.append((len(found), start, token.start() - start))
                start = token.end()
                if depth == 0:
                    break
    if depth or not found or content[start:].strip():
        parse_json(content[begin:], str(file))  # says what is wrong with it
        raise UserError(f"{file}: not a JSON list; the file may be cut off, fetch or write it again")
    if len(found) == 1 and not content[found[0][1] : found[0][1] + found[0][2]].strip():
        found = []
    return np.array(found, LOCATION)


# Parquet --------------------------------------------------------------------------------------------------------------


class ArrowFile:
    """The rows of an Arrow stream file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)]).tolist()

    def fields(self, start: int, length: int, source: str) -> Mapping[str, Any]:
        number = bisect.bisect_right(self._starts, start) - 1
        try:
            (fields,) = self._batches[number].slice(start - self._starts[number], 1).to_pylist()
        except ValueError as fault:  # text that is no UTF-8; Arrow's own errors are ValueErrors, too
            raise UserError(f"{source}: cannot be read ({fault}); correct or drop the row") from fault
        assert isinstance(fields, dict)
        return fields


def parquet_footer(file: Path, columns: Columns) -> pq.FileMetaData:
    """Read the footer of a parquet file. Raises UserError where it is none, empty or lacks one of ``columns``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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


def copy_parquet(file: Path, columns: Columns, target: Path) -> np.ndarray:
    """Write the used columns of a parquet file as an Arrow stream; LOCATION of each row in it."""
    import pyarrow as pa

    footer = parquet_footer(file, columns)
    names = footer.schema.to_arrow_schema().names
    used = [name for name in columns.names if name in names]
    bytes_per_row = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)) / footer.num_rows
    batch_rows = max(1, min(_MAX_BATCH_ROWS, int(_BATCH_BYTES / max(bytes_per_row, 1))))
    done = 0
    try:
        with pa.OSFile(str(target), "wb") as sink:
            writer = None
            for batch in _parquet_batches(file, used, batch_rows):
                writer = writer or pa.ipc.new_stream(sink, batch.schema)
                writer.write_batch(batch)
                done += batch.num_rows
            if writer is not None:
                writer.close()
    except (pa.ArrowException, OSError, ValueError) as fault:
        if isinstance(fault, OSError) and fault.errno == errno.ENOSPC:
            raise
        raise UserError(f"{file}: cannot be read from row {done} on ({fault}); fetch or write it again") from fault
    rows = np.zeros(done, LOCATION)
    rows["number"] = rows["start"] = np.arange(done)
    return rows


def _parquet_batches(file: Path, columns: list[str], batch_rows: int) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, page_checksum_verification=True) as opened:
        yield from opened.iter_batches(batch_rows, columns=columns)
