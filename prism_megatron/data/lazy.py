"""A sequence of the rows of data files, each read when it is asked for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from prism_megatron.data.fields import Images
from prism_megatron.data.index import Index, RowFormat, load_index
from prism_megatron.data.row_files import RowFile
from prism_megatron.data.rows import Row, Trace, raise_faults
from prism_megatron.data.sources import Data, data_files
from prism_megatron.errors import UserError
from prism_megatron.types import Example, PreferencePair

SKIPPED = "skipped_rows.jsonl"


@dataclass(frozen=True)
class ReadOptions:
    """How data files are read; ``sections.DatasetConfig`` explains each. Without ``cache`` the index is temporary."""

    cache: Path | None = None
    skip_bad_rows: bool = False
    max_bad_fraction: float = 0.0
    check_images_max_rows: int = 20_000


class SkippedRows:
    """Which rows of a data set are skipped, and why: counted, listed, and limited."""

    def __init__(self, index: Index, options: ReadOptions) -> None:
        self._index = index
        self._limit = options.max_bad_fraction * len(index) if options.skip_bad_rows else 0
        self._faults = dict(index.faults)
        self._new: dict[int, str] = {}
        self._path: Path | None = None
        self._reports_new = True
        self._check_limit()

    def __contains__(self, number: int) -> bool:
        return number in self._faults

    def add(self, number: int, fault: str) -> None:
        """Skip a row from now on. Raises UserError where no more may be skipped."""
        self._faults[number] = self._new[number] = fault
        self._check_limit()
        if self._reports_new:
            print(f"skipped a row: {fault}", flush=True)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(self._line(number))

    def collect(self) -> dict[int, str]:
        """Those added since the last call, by their number; they are not reported from now on."""
        new, self._new, self._reports_new = self._new, {}, False
        return new

    def report(self, path: Path, *, known: bool, new: bool) -> None:
        """Write to ``path``, as :meth:`Rows.report_skipped` says."""
        self._path, self._reports_new = path, new
        if known and self._faults:
            print(f"skipped {len(self._faults)} of {len(self._index)} rows, listed in {path}", flush=True)
            with path.open("a") as file:
                file.writelines(map(self._line, self._faults))

    def _check_limit(self) -> None:
        if len(self._faults) > self._limit or len(self._faults) == len(self._index):
            raise_faults(list(self._faults.values()), len(self._index))

    def _line(self, number: int) -> str:
        return json.dumps({"source": self._index.source(number), "fault": self._faults[number]}) + "\n"


class Rows[R: (Example, PreferencePair)](Sequence[R]):
    """The rows of a data set that can be used. ``rows[i]`` reads and decodes one, nothing is resident.

    What the index does not know of a row is found when it is read: a picture that cannot be decoded, or a check that
    raises UserError. Where bad rows are skipped the next usable row takes its position, on every rank and in every
    epoch. Else, or beyond the limit, the error is raised.
    """

    def __init__(self, index: Index, row_format: RowFormat[R], numbers: np.ndarray, skipped: SkippedRows) -> None:
        self.row_index = index
        self.numbers = numbers  # of the rows in the index
        self._format: RowFormat[R] = row_format
        self._skipped = skipped
        self._checks: list[Callable[[R], None]] = []
        self._files: dict[int, RowFile] = {}
        self._read = Images(check=False)
        self._read_and_check = Images()

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, key: int) -> R: ...
    @overload
    def __getitem__(self, key: slice) -> Rows[R]: ...
    def __getitem__(self, key: int | slice) -> R | Rows[R]:
        if isinstance(key, slice):
            part = Rows(self.row_index, self._format, self.numbers[key], self._skipped)
            part._checks, part._files = self._checks, self._files
            return part
        if not -len(self) <= key < len(self):
            raise IndexError(key)
        for position in range(key, key + len(self)):
            number = int(self.numbers[position % len(self)])
            if number in self._skipped:
                continue
            try:
                return self._row(number)
            except UserError as fault:
                self._skipped.add(number, str(fault))
        raise UserError(f"{self.row_index.source(int(self.numbers[key]))}: neither it nor another row can be used")

    def ids(self) -> Iterator[str]:
        """The id of each row, none of them read."""
        return (self.row_index.ids[number] for number in self.numbers.tolist())

    def check_when_read(self, check: Callable[[R], None]) -> None:
        """Call ``check`` on the rows whose picture sizes the index does not know, when they are read."""
        self._checks.append(check)

    def report_skipped(self, path: Path, *, known: bool, new: bool) -> None:
        """Add skipped rows to the file ``path``: one JSON object a row, with its source and fault.

        ``known`` those that are known now, for one rank of all; ``new`` those found from now on, for one rank of each
        replica of the model.
        """
        self._skipped.report(path, known=known, new=new)

    def collect_skipped(self) -> dict[int, str]:
        """Faults of rows skipped since the last call, for :meth:`skip_all` of another process, which reports them."""
        return self._skipped.collect()

    def skip_all(self, faults: Mapping[int, str]) -> None:
        """Skip rows that another process found. Raises UserError beyond the limit."""
        for number, fault in faults.items():
            if number not in self._skipped:
                self._skipped.add(number, fault)

    def _row(self, number: int) -> R:
        index, entry = self.row_index, self.row_index.entries[number]
        file, is_known = int(entry["file"]), bool(entry["sizes"] >= 0)
        if file not in self._files:
            self._files[file] = index.open(file)
        source = index.source(number)
        fields = self._files[file].fields(int(entry["start"]), int(entry["length"]), source)
        row = Row(fields, index.files[file], int(entry["number"]), source)
        record: R = self._format.record_of(row, self._read if is_known else self._read_and_check)
        record = replace(record, id=index.ids[number])
        for check in self._checks if not is_known else ():
            check(record)
        return record

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_files": {}}  # another process opens them itself


def read_rows[R: (Example, PreferencePair)](data: Data, row_format: RowFormat[R], options: ReadOptions) -> Rows[R]:
    """The rows of all files. Raises UserError that quotes the first bad rows and counts all, if too many are."""
    files = data_files(data)
    if options.cache is not None:
        index = load_index(files, row_format, options.cache, options.check_images_max_rows)
    else:
        temporary = tempfile.TemporaryDirectory(prefix="prism-rows-")
        index = load_index(files, row_format, Path(temporary.name), options.check_images_max_rows)
        index = replace(index, temporary=temporary)
    skipped = SkippedRows(index, options)
    return Rows(index, row_format, np.delete(np.arange(len(index)), list(index.faults)), skipped)


def read_row[R: (Example, PreferencePair)](rows: Sequence[R], position: int, trace: Trace) -> R:
    """``rows[position]``; ``trace`` is told its source before it is read."""
    if isinstance(rows, Rows):
        trace(rows.row_index.source(int(rows.numbers[position])))
    return rows[position]


def positions_by_id[R: (Example, PreferencePair)](rows: Sequence[R], ids: Collection[str]) -> dict[str, int]:
    """At which positions the rows of these ids are."""
    searched = set(ids)
    if not searched:
        return {}
    names = rows.ids() if isinstance(rows, Rows) else (row.id for row in rows)
    return {name: position for position, name in enumerate(names) if name in searched}
