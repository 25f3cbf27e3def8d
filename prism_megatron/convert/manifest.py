"""What a directory of weights holds, with checksums: written last, checked before anything is believed.

Imports no torch, so that a launcher may look at a directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"  # of a directory that is not finished
_THREADS = 8  # that read and hash files at once


@dataclass(frozen=True)
class TensorEntry:
    """An HF tensor. ``sha256`` is of its values in C order, whatever file they are in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


def digest_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, sha256)


def digest_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Sizes and checksums of files, several read at a time."""
    ordered = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(ordered, threads.map(lambda name: digest_file(directory / name), ordered), strict=True))


def write_manifest(
    directory: Path,
    files: Mapping[str, FileEntry],
    tensors: Iterable[TensorEntry] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.json``; until it is there, whole and on disk, the directory counts as unfinished."""
    content = {
        **(about or {}),
        "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)},
        "tensors": [dataclasses.asdict(entry) | {"shape": list(entry.shape)} for entry in tensors],
    }
    write_atomic(directory / MANIFEST, _text(content))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises UserError if there is none or it cannot be read."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"it has no {MANIFEST}: it was never finished")
    try:
        text = path.read_bytes().decode()
        content: dict[str, Any] = json.loads(text)
        if text != _text({key: value for key, value in content.items() if key != "sha256"}):
            raise UserError("its own checksum is wrong")
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        tensors = [TensorEntry(**entry | {"shape": tuple(entry["shape"])}) for entry in content["tensors"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} is damaged ({error})") from error
    return {**content, "files": files, "tensors": tensors}


def _text(content: Mapping[str, Any]) -> str:
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": sha256}, indent=1) + "\n"


def first_fault(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files of a directory, or None: each must have the size and checksum of the manifest.

    ``part`` of ``parts`` checksums only its share, so that many ranks check a large checkpoint together.
    """
    try:
        files: dict[str, FileEntry] = read_manifest(directory)["files"]
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if (size := (directory / name).stat().st_size) != expected.bytes:
            return f"{name} has {size} bytes, not {expected.bytes}"
    digests = digest_files(directory, sorted(files)[part::parts])
    wrong = [name for name, found in digests.items() if found != files[name]]
    return f"{wrong[0]} does not have its checksum" if wrong else None


def append_line(journal: Path, content: Any) -> None:
    """Note a step that is done, on disk before this returns."""
    with journal.open("a") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(journal: Path) -> list[Any]:
    """The steps done by an interrupted run; a line that the interruption cut short is removed."""
    if not journal.is_file():
        return []
    lines = journal.read_text().split("\n")
    if lines.pop():
        journal.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def is_converted(directory: Path) -> bool:
    """Whether the weights are Megatron's instead of safetensors."""
    return (directory / ".metadata").is_file()
