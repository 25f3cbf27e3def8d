"""Files that survive a crash or power failure: atomic writes, and JSON Lines that an interrupted process can resume."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file, creating its folders; a reader sees all of it, or the previous content.

    Args:
        path: file to write.
        content: text, written as UTF-8, or bytes.
        durable: return only when the file is on disk. Not needed for files that are listed in a later, durable one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


@contextmanager
def directory_written_atomically(final: Path, resume: bool = False) -> Iterator[Path]:
    """Yield a hidden directory that becomes ``final`` when the block ends without an error.

    An error leaves it behind, next to ``final``. It is empty at first, unless ``resume``: then it contains what an
    interrupted process wrote.
    """
    partial = final.with_name(f".{final.name}.partial")
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    fsync(partial)
    replace_directory(partial, final)


def replace_directory(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``, removing a directory of that name; neither is ever seen incomplete."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path: Path) -> None:
    """Force a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None without a file and, with a warning, for any other content."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes().decode())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        print(f"{path} is damaged (not a JSON object) and is ignored", flush=True)
        return None
    return content


class JSONLines:
    """A file of JSON values, one per line, that is only appended to.

    Opening it removes an incomplete last line, which an interrupted process leaves. With ``durable``, each line is on
    disk before :meth:`append` returns.
    """

    def __init__(self, path: Path, durable: bool = False) -> None:
        self._durable = durable
        _complete_last_line(path)
        self._file = path.open("ab")

    def __enter__(self) -> JSONLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def append(self, value: Any) -> None:
        """Write a value; other processes can read it when this returns."""
        try:
            line = json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can represent
            line = json.dumps(value).encode()
        self._file.write(line + b"\n")
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path, is_valid: Callable[[Any], bool] = lambda value: True) -> Iterator[Any]:
    r"""Yield the valid values of a file of JSON Lines, none without a file; warn about the others at the end.

    Lines end with ``\n`` only: ``str.splitlines`` also splits at U+2028 and others, which JSON strings may contain.
    """
    if not path.is_file():
        return
    invalid = 0
    with path.open("rb") as file:
        for line in file:
            value = _parsed(line)
            if value is None or not is_valid(value):
                invalid += 1
            else:
                yield value
    if invalid:
        print(f"{path}: skipped {invalid} lines that are damaged or not of this format", flush=True)


def iteration_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a stage's log, as :func:`read_json_lines`."""
    return read_json_lines(path, _is_iteration_row)


def drop_rows_after(path: Path, iteration: int) -> None:
    """Truncate a stage's log after the last row of ``iteration`` or before; later iterations are run again.

    Reads only the part that is removed. Warns if that contained other lines than rows of a log and an incomplete last
    line, which a killed run leaves.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    invalid = 0
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                line = content[start:end]
                row = _parsed(line)
                is_row = _is_iteration_row(row)
                if is_row and row["iteration"] <= iteration and line.endswith(b"\n"):
                    break
                invalid += not is_row and line.endswith(b"\n")
                end = start
        file.truncate(end)
    if invalid:
        print(f"{path}: removed {invalid} lines at its end that are not rows of a log", flush=True)


def _complete_last_line(path: Path) -> None:
    """Remove an incomplete last line, or end a complete one."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            last = content[start:]
        if not last:
            return
        if _parsed(last) is None:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _parsed(line: bytes) -> Any:
    """Return the JSON value of a line; None for null and for anything else."""
    try:
        return json.loads(line.decode())
    except ValueError:
        return None


def _is_iteration_row(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("iteration"), int)
