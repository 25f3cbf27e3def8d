"""The files that a data setting names. Imports nothing heavy: launchers ask whether they changed."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from prism_megatron.errors import UserError

Data = str | Path | Sequence[str | Path]

JSON, PARQUET = (".jsonl", ".json"), (".parquet",)


def data_files(data: Data) -> list[Path]:
    """The files that ``data`` names: a file, a folder, a pattern, several of these with commas between, or a list.

    Raises UserError where there is none.
    """
    names = [data] if isinstance(data, str | Path) else list(data)
    files = [file for name in names for file in _named(str(name))]
    if not files:
        raise UserError("no data file is named; give a file, a folder or a pattern")
    return list(dict.fromkeys(files))


def _named(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        lines, tables = ([p for p in inside if p.suffix in suffixes] for suffixes in (JSON, PARQUET))
        if bool(lines) == bool(tables):
            contents = "both JSON and parquet files" if lines else "no .jsonl, .json or .parquet file"
            raise UserError(f"{name} holds {contents}; name the file, or a pattern such as '{name}/*.parquet'")
        return lines or tables
    if found := sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file()):
        return found
    if "," in name:
        return [file for part in name.split(",") for file in _named(part.strip())]
    raise UserError(f"{name}: no such data file; correct it, or write the built-in task with make tiny-data")
