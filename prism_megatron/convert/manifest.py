"""The manifest of a directory of weights: sizes and checksums of its files, written last and verified before use.

Imports no torch, since launchers read manifests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
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
JOURNAL = "journal.jsonl"  # finished files of a directory that is being written
_THREADS = 8


@dataclass(frozen=True)
class TensorEntry:
    """An HF tensor. ``sha256`` is the checksum of its values in C order, independent of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorEntry:
        return cls(**{**entry, "shape": tuple(entry["shape"])})


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of a file."""

    bytes: int
    sha256: str


class HashedFile(io.RawIOBase):
    """A file that is only appended to, and the checksum of its content. It is on disk when it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.position = path, 0
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        written = self._file.write(data)
        self.position += written
        return written

    def close(self) -> None:
        if not self.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        super().close()

    @property
    def entry(self) -> FileEntry:
        """Size and checksum of what was written so far."""
        return FileEntry(self.position, self._digest.hexdigest())


def digest_file(path: Path) -> FileEntry:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, sha256)


def digest_files(directory: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Sizes and checksums of files, which are read in several threads."""
    ordered = list(names)
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(ordered, threads.map(lambda name: digest_file(directory / name), ordered), strict=True))


def write_manifest(
    directory: Path,
    files: Mapping[str, FileEntry],
    tensors: Iterable[TensorEntry] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write ``manifest.json``; a directory without one is incomplete."""
    content = {
        **(about or {}),
        "files": {name: dataclasses.asdict(files[name]) for name in sorted(files)},
        "tensors": [dataclasses.asdict(entry) | {"shape": list(entry.shape)} for entry in tensors],
    }
    write_atomic(directory / MANIFEST, _text(content))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read ``manifest.json``, with ``FileEntry`` and ``TensorEntry`` objects. Raises UserError without a valid one."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(f"it has no {MANIFEST}: it was never finished")
    try:
        text = path.read_bytes().decode()
        content: dict[str, Any] = json.loads(text)
        if text != _text({key: value for key, value in content.items() if key != "sha256"}):
            raise UserError("its own checksum is wrong")
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        tensors = [TensorEntry.from_json(entry) for entry in content["tensors"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path.name} is damaged ({error})") from error
    return {**content, "files": files, "tensors": tensors}


def _text(content: Mapping[str, Any]) -> str:
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": sha256}, indent=1) + "\n"


def first_fault(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """Describe the first file that is missing or differs from the manifest in size or checksum; None if all match.

    Checksums are verified for one of ``parts`` equal shares of the files, so that many ranks verify a large checkpoint
    together.
    """
    try:
        files: dict[str, FileEntry] = read_manifest(directory)["files"]
    except UserError as error:
        return str(error)
    for name, expected in files.items():
        if not (directory / name).is_file():
            return f"{name} is missing"
        if (size := (directory / name).stat().st_size) != expected.bytes:
            return f"{name} has {size} bytes, not {expected.bytes}"
    digests = digest_files(directory, sorted(files)[part::parts])
    wrong = [name for name, found in digests.items() if found != files[name]]
    return f"{wrong[0]} does not have its checksum" if wrong else None


def is_converted(directory: Path) -> bool:
    """Return whether the weights are in Megatron's format instead of safetensors."""
    return (directory / ".metadata").is_file()
