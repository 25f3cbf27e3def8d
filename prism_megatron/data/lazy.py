"""A sequence of the rows of data files, each read when it is asked for."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from prism_megatron.data.fields import Images
from prism_megatron.data.index import Index, RowFormat, load_index
from prism_megatron.data.row_files import RowFile
from prism_megatron.data.rows import ReadOptions, Row, Trace, raise_faults
from prism_megatron.data.sources import Data, data_files
from prism_megatron.errors import UserError
from prism_megatron.types import Example, PreferencePair

SKIPPED = "skipped_rows.jsonl"


class OverlongRow(UserError):
    """A row that is too long. It is skipped where overlong rows are dropped, however many there are."""


class SkippedRows:
    """The rows of a data set that are skipped, and why: counted, listed, and limited."""

    def __init__(self, index: Index, options: ReadOptions) -> None:
        self._index = index
        self._limit = options.max_bad_fraction * len(index) if options.skip_bad_rows else 0
        self._faults = dict(index.faults)
        self._overlong: set[int] = set()
        self._new: dict[int, tuple[str, bool]] = {}
        self._path: Path | None = None
        self._reports_new = True
        self._check_limit()

    def __contains__(self, number: int) -> bool:
        return number in self._faults

    def drop(self, faults: Mapping[int, str]) -> None:
        """Skip rows that are too long. They are not counted among the bad ones."""
        self._faults |= faults
        self._overlong |= set(faults)

    def add(self, number: int, fault: str, is_overlong: bool) -> None:
        """Skip a row from now on. Raises UserError where no more may be skipped."""
        self._faults[number] = fault
        self._new[number] = (fault, is_overlong)
        if is_overlong:
            self._overlong.add(number)
        self._check_limit()
        if self._reports_new:
            print(f"skipped a row: {fault}", flush=True)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(self._line(number))

    def collect(self) -> dict[int, tuple[str, bool]]:
        """Those added since the last call, by their number, for :meth:`add`; they are not reported from now on."""
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
        bad = [fault for number, fault in self._faults.items() if number not in self._overlong]
        if len(bad) > self._limit or len(self._faults) == len(self._index):
            raise_faults(bad or list(self._faults.values()), len(self._index))

    def _line(self, number: int) -> str:
        return json.dumps({"source": self._index.source(number), "fault": self._faults[number]}) + "\n"


class Rows[R: (Example, PreferencePair)](Sequence[R]):
    """The rows of a data set that can be used. ``rows[i]`` reads and decodes one, nothing is resident.

    What the index does not know of a row is found when it is read: a picture that cannot be decoded, or a check that
    raises UserError. Where bad rows are skipped the next usable row takes its position, on every rank and in every
    epoch. Else, or beyond the limit, the error is raised.
    """

    def __init__(self, index: Index, row_format: RowFormat[R], options: ReadOptions, skipped: SkippedRows) -> None:
        self.row_index = index
        self.numbers = np.delete(np.arange(len(index)), list(index.faults))  # of the rows in the index
        self._format: RowFormat[R] = row_format
        self._options = options
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
            return self._part(self.numbers[key])
        if not -len(self) <= key < len(self):
            raise IndexError(key)
        for position in range(key, key + len(self)):
            number = int(self.numbers[position % len(self)])
            if number in self._skipped:
                continue
            try:
                return self._row(number)
            except UserError as fault:
                self._skipped.add(number, str(fault), isinstance(fault, OverlongRow))
        raise UserError(f"{self.row_index.source(int(self.numbers[key]))}: neither it nor another row can be used")

    def without(self, faults: Mapping[int, str]) -> Rows[R]:
        """The rows but for those at these positions, which are too long: what is wrong with each is reported."""
        self._skipped.drop({int(self.numbers[position]): fault for position, fault in faults.items()})
        return self._part(np.delete(self.numbers, list(faults)))

    def _part(self, numbers: np.ndarray) -> Rows[R]:
        part = Rows(self.row_index, self._format, self._options, self._skipped)
        part.numbers, part._checks, part._files = numbers, list(self._checks), self._files
        return part

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

    def collect_skipped(self) -> dict[int, tuple[str, bool]]:
        """Rows skipped since the last call, for :meth:`skip_all` of another process, which reports them."""
        return self._skipped.collect()

    def skip_all(self, skipped: Mapping[int, tuple[str, bool]]) -> None:
        """Skip rows that another process found. Raises UserError beyond the limit."""
        for number, (fault, is_overlong) in skipped.items():
            if number not in self._skipped:
                self._skipped.add(number, fault, is_overlong)

    def _row(self, number: int) -> R:
        index, entry = self.row_index, self.row_index.entries[number]
        file, is_known = int(entry["file"]), bool(entry["sizes"] >= 0)
        if file not in self._files:
            self._files[file] = index.open(file)
        source = index.source(number)
        fields = self._files[file].fields(int(entry["start"]), int(entry["length"]), source)
        options = self._options
        row = Row(options.renamed(fields), index.files[file], int(entry["number"]), source, options.image_root)
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
        index = load_index(files, row_format, options.cache, options)
    else:
        temporary = tempfile.TemporaryDirectory(prefix="prism-rows-")
        index = load_index(files, row_format, Path(temporary.name), options)
        index = replace(index, temporary=temporary)
    return Rows(index, row_format, options, SkippedRows(index, options))


def read_row[R: (Example, PreferencePair)](rows: Sequence[R], position: int, trace: Trace) -> R:
    """``rows[position]``; ``trace`` gets its source before it is read."""
    if isinstance(rows, Rows):
        trace(rows.row_index.source(int(rows.numbers[position])))
    return rows[position]


def positions_by_id[R: (Example, PreferencePair)](rows: Sequence[R], ids: Collection[str]) -> dict[str, int]:
    """Positions of the rows with these ids."""
    searched = set(ids)
    if not searched:
        return {}
    names = rows.ids() if isinstance(rows, Rows) else (row.id for row in rows)
    return {name: position for position, name in enumerate(names) if name in searched}
