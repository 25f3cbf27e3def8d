"""What a directory of weights holds, with checksums: written last, checked before anything is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.files import write_atomic

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"  # of a directory that is not finished
_CHECKED_AT_ONCE = 1 << 22  # elements


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
    for number, (name, expected) in enumerate(sorted(files.items())):
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.bytes:
            return f"{name} has {path.stat().st_size} bytes, not {expected.bytes}"
        if number % parts == part and digest_file(path) != expected:
            return f"{name} does not have its checksum"
    return None


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises UserError if a value is infinite or not a number."""
    for piece in torch.split(tensor.detach().flatten(), _CHECKED_AT_ONCE):
        if piece.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(piece))).all()):
            raise UserError(f"{name} holds values that are infinite or not a number; this checkpoint is broken")


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
