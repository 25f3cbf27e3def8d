"""The index of a data set: where each row is, its id, its size, and what is wrong with it.

It is built once, by all processors of the node, and stored, so that later starts and the other ranks of the node map
it into memory. Every row is parsed and checked for it; pictures are decoded where there are not too many.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_megatron.data.fields import Images, ImageSizes
from prism_megatron.data.row_files import (
    LOCATION,
    ArrowFile,
    JsonFile,
    RowFile,
    copy_parquet,
    is_json_list,
    is_parquet,
    json_locations,
)
from prism_megatron.data.rows import Columns, ReadOptions, Row
from prism_megatron.errors import UserError
from prism_megatron.types import Example, PreferencePair

# Where a row is and how long: bytes of its prompt's and of its response's text, as the tokenizer normalises them; which
# roles its turns have, a number of Index.roles; how many pictures. sizes: where its pictures' sizes start in
# Index.image_sizes, -1 where they are not known.
ENTRY = np.dtype(
    [
        ("file", np.int32),
        *[(name, LOCATION[name]) for name in LOCATION.names or ()],
        *[("prompt_bytes", np.int64), ("response_bytes", np.int64), ("roles", np.int32), ("images", np.int32)],
        ("sizes", np.int64),
    ]
)
_ROWS_PER_TASK = 2048
_ROWS_PER_PROCESS = 20_000  # fewer are checked before another process has started
_MAX_PROCESSES = 32


@dataclass(frozen=True)
class RowFormat[R: (Example, PreferencePair)]:
    """The columns of a kind of data file, and the function, of a module, that makes a record of a row."""

    columns: Columns
    record_of: Callable[[Row, Images], R]


@dataclass(frozen=True)
class Index:
    """The rows of a data set, as arrays. ``faults`` are of rows that cannot be used, by their number."""

    files: list[Path]
    arrow: list[Path | None]
    is_list: list[bool]
    entries: np.ndarray
    ids: Texts
    image_sizes: np.ndarray
    roles: list[tuple[str, ...]]
    faults: dict[int, str]
    temporary: tempfile.TemporaryDirectory[str] | None = None  # the folder that goes when the index does

    def __len__(self) -> int:
        return len(self.entries)

    def source(self, number: int) -> str:
        entry = self.entries[number]
        file = int(entry["file"])
        return _source(self.files[file], self.is_list[file], int(entry["number"]))

    def open(self, file: int) -> RowFile:
        copy = self.arrow[file]
        return JsonFile(self.files[file]) if copy is None else ArrowFile(copy)


@dataclass(frozen=True)
class Texts:
    """Many short texts in one array of bytes."""

    content: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        encoded = [text.encode() for text in texts]
        content = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(content, np.cumsum([len(text) for text in encoded], dtype=np.int64))

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return str(self.content[start : self.ends[number]].tobytes(), "utf-8")


def _source(file: Path, is_list: bool, number: int) -> str:
    return f"{file}, {'row' if is_list else 'line'} {number}"


def load_index(files: Sequence[Path], row_format: RowFormat[Any], cache: Path, options: ReadOptions) -> Index:
    """The index in the folder ``cache``, built there first where it is not. Processes of a node wait for one of them.

    Raises UserError for a file that cannot be read at all.
    """
    folder = cache / _key(files, row_format, options)
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not folder.is_dir():
                unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
                try:
                    build_index(files, row_format, unfinished, options)
                    with contextlib.suppress(OSError):  # another node was faster, on a file system without locks
                        unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    return _read_index(files, folder)


def build_index(files: Sequence[Path], row_format: RowFormat[Any], folder: Path, options: ReadOptions) -> None:
    """Write the index of ``files`` to ``folder``. Raises UserError for a file that cannot be read at all."""
    tasks: list[_Task] = []
    is_list = []
    needed = tuple(tuple(options.stored_names(names)) for names in row_format.columns.needed)
    columns = Columns(needed, tuple(options.stored_names(row_format.columns.others)))
    for number, file in enumerate(files):
        parquet = is_parquet(file)
        copy = folder / f"{number}.arrow" if parquet else None
        rows = json_locations(file) if copy is None else copy_parquet(file, columns, copy)
        if not len(rows):
            raise UserError(f"{file}: empty data set; check that the file was written to its end")
        is_list.append(parquet or is_json_list(file))
        tasks += [
            _Task(number, file, copy, is_list[-1], rows[low : low + _ROWS_PER_TASK])
            for low in range(0, len(rows), _ROWS_PER_TASK)
        ]
    count = sum(len(task.rows) for task in tasks)
    if count > _ROWS_PER_PROCESS:
        print(f"{files[0]}{' ..' * (len(files) > 1)}: checking {count} rows, this once", flush=True)
    check = functools.partial(_check_rows, row_format, options, count <= options.check_images_max_rows)
    with _mapper(count) as mapped:
        parts = list(mapped(check, tasks))
    _write_index(folder, is_list, parts)
    folder.chmod(0o755)


# Checking rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Some rows of a file."""

    file_number: int
    file: Path
    arrow: Path | None
    is_list: bool
    rows: np.ndarray


@dataclass(frozen=True)
class _Checked:
    """The result of a task; ``faults`` by the number of the row in it."""

    entries: np.ndarray
    ids: list[str]
    roles: list[tuple[str, ...]]
    image_sizes: list[int]
    faults: dict[int, str]


def _check_rows(row_format: RowFormat[Any], options: ReadOptions, check_images: bool, task: _Task) -> _Checked:
    opened = JsonFile(task.file) if task.arrow is None else ArrowFile(task.arrow)
    images = _sizes_of_process(check_images)
    entries = np.zeros(len(task.rows), ENTRY)
    entries["file"], entries["sizes"] = task.file_number, -1
    for name in LOCATION.names or ():
        entries[name] = task.rows[name]
    ids: list[str] = []
    roles: dict[tuple[str, ...], int] = {}
    image_sizes: list[int] = []
    faults: dict[int, str] = {}
    for i, (number, start, length) in enumerate(task.rows.tolist()):
        source = _source(task.file, task.is_list, number)
        images.of_last_row = None
        try:
            fields = options.renamed(opened.fields(start, length, source))
            row = Row(fields, task.file, number, source, options.image_root)
            record = row_format.record_of(row, images)
        except UserError as fault:
            faults[i] = str(fault)
            ids.append("")
            continue
        ids.append(record.id)
        turns = tuple(message.role for message in record.messages)
        response = (record.response or "") if isinstance(record, Example) else ""
        known = images.of_last_row is not None
        entries[i]["prompt_bytes"] = sum(normal_bytes(message.content) for message in record.messages)
        entries[i]["response_bytes"] = normal_bytes(response)
        entries[i]["roles"] = roles.setdefault(turns, len(roles))
        entries[i]["images"] = len(record.images)
        entries[i]["sizes"] = len(image_sizes) if known else -1
        image_sizes += images.of_last_row or []
    return _Checked(entries, ids, list(roles), image_sizes, faults)


@functools.lru_cache(maxsize=1)
def _sizes_of_process(check: bool) -> ImageSizes:
    """Pictures that this process has checked: tasks show the same ones."""
    return ImageSizes(check)


def normal_bytes(text: str) -> int:
    """Bytes of a text as the tokenizer normalises it, which may lengthen it."""
    if text.isascii():
        return len(text)
    if unicodedata.is_normalized("NFC", text):
        return len(text.encode())
    return len(unicodedata.normalize("NFC", text).encode())


@contextlib.contextmanager
def _mapper(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """``map``, over processes where ``count`` rows are worth them."""
    processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES, 1 + count // _ROWS_PER_PROCESS)
    try:
        if processes == 1:
            yield map
            return
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            yield pool.map
    finally:
        _sizes_of_process.cache_clear()


# Stored ---------------------------------------------------------------------------------------------------------------


def _write_index(folder: Path, is_list: list[bool], parts: Sequence[_Checked]) -> None:
    entries = np.concatenate([part.entries for part in parts])
    roles: dict[tuple[str, ...], int] = {}
    faults: dict[int, str] = {}
    first_row, first_size = 0, 0
    for part in parts:
        rows = entries[first_row : first_row + len(part.entries)]
        of_part = np.array([roles.setdefault(turns, len(roles)) for turns in part.roles] or [0])
        rows["roles"] = of_part[rows["roles"]]
        rows["sizes"][rows["sizes"] >= 0] += first_size
        faults |= {first_row + i: fault for i, fault in part.faults.items()}
        first_row, first_size = first_row + len(rows), first_size + len(part.image_sizes)
    ids = Texts.of(_unique([row_id for part in parts for row_id in part.ids]))
    np.save(folder / "entries.npy", entries)
    np.save(folder / "image_sizes.npy", np.array([n for part in parts for n in part.image_sizes], np.int32))
    np.save(folder / "ids.npy", ids.content)
    np.save(folder / "id_ends.npy", ids.ends)
    described = {"is_list": is_list, "roles": list(roles), "faults": faults}
    (folder / "index.json").write_text(json.dumps(described))


def _read_index(files: Sequence[Path], folder: Path) -> Index:
    described = json.loads((folder / "index.json").read_text())
    arrays = {name: _mapped(folder / f"{name}.npy") for name in ("entries", "image_sizes", "ids", "id_ends")}
    copies = [folder / f"{number}.arrow" for number in range(len(files))]
    return Index(
        files=list(files),
        arrow=[copy if copy.exists() else None for copy in copies],
        is_list=described["is_list"],
        entries=arrays["entries"],
        ids=Texts(arrays["ids"], arrays["id_ends"]),
        image_sizes=arrays["image_sizes"],
        roles=[tuple(turns) for turns in described["roles"]],
        faults={int(number): fault for number, fault in described["faults"].items()},
    )


def _mapped(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)  # nothing is not mapped
    return array


def _unique(ids: Sequence[str]) -> list[str]:
    """The ids, where they repeat the later ones with a number behind: "7", "7#2", "7#3"."""
    taken = set(ids)
    seen = Counter[str]()
    result = []
    for name in ids:
        seen[name] += 1
        if name and (number := seen[name]) > 1:  # a row without a name cannot be used
            while (numbered := f"{name}#{number}") in taken:
                number += 1
            taken.add(numbered)
            name = numbered
        result.append(name)
    return result


def _key(files: Sequence[Path], row_format: RowFormat[Any], options: ReadOptions) -> str:
    """Checksum of all that decides the content of an index: the files, their format, and the code that reads them."""
    digest = hashlib.sha256(_code())
    digest.update(
        f"{row_format.record_of.__name__} {row_format.columns} {options.check_images_max_rows} "
        f"{options.columns} {options.image_root}".encode()
    )
    for file in files:
        status = file.stat()
        stamp = f"{file.resolve()}\0{file.name}\0{status.st_size} {status.st_mtime_ns} {status.st_ino}\0"
        digest.update(stamp.encode())
    return digest.hexdigest()[:24]


@functools.cache
def _code() -> bytes:
    """Checksum of the modules that read rows: what they let pass may change with them."""
    names = ("dataset", "fields", "images", "index", "layouts", "response", "row_files", "rows")
    content = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(content).digest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The kernel's lock on a file; none where the file system has no locks."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
