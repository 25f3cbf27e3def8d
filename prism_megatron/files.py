"""Files that are there whole or not at all, and stay there after a power cut."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes, durable: bool = True) -> None:
    """Write a file, and the folders above it, so that whoever opens it finds all of it, or what was there before.

    It is on the disk before this returns, unless ``durable`` is false: for many small files that are worth nothing
    until another one, written after them, lists them.
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


def fsync(path: Path) -> None:
    """Force a file, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file. None if there is no such file, or it holds anything else, which is said aloud."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes().decode())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        print(f"{path} is damaged (not a JSON object) and counts as missing", flush=True)
        return None
    return content


def iteration_row(line: bytes) -> dict[str, Any] | None:
    """A line of a stage's log: a JSON object with the number of its ``iteration``. None if it is anything else."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        return None
    return row


def iteration_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a stage's log, none if there is no file; says aloud how many lines are none."""
    if not path.is_file():
        return
    foreign = 0
    with path.open("rb") as file:  # lines end with \n only: str.splitlines() knows others, which a text may hold
        for line in file:
            row = iteration_row(line)
            if row is None:
                foreign += 1
            else:
                yield row
    if foreign:
        print(f"{path}: passed over {foreign} lines that are no rows of a log", flush=True)


def drop_rows_after(path: Path, iteration: int) -> None:
    """Cut off the end of a stage's log that is of later iterations, which run again, or is no row at all.

    Only that end is read, however long the file is. Says aloud if it held lines that are no rows; the line that a
    killed run was writing is dropped without a word.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    foreign = 0
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = len(content)
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                line = content[start:end]
                row = iteration_row(line)
                if row is not None and row["iteration"] <= iteration and line.endswith(b"\n"):
                    break
                foreign += row is None and line.endswith(b"\n")
                end = start
        file.truncate(end)
    if foreign:
        print(f"{path}: dropped {foreign} lines at its end that are no rows of a log", flush=True)
