"""What a rank's background writer leaves for the trainer: which items it wrote, and the checksum of each of its files.

Megatron hands results over through a manager process that it spawns on the first save and that a killed run leaves
behind. A file in the unfinished folder does the same, and is gone with the folder.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from prism_megatron.convert.manifest import FileEntry, digest_file

_PREFIX = ".written_"


@dataclass(frozen=True)
class _Results:
    """Megatron's results queue: the writer puts once, the trainer gets once."""

    path: Path

    def put(self, results: dict[int, list[WriteResult]] | Exception) -> None:
        """Checksum the files here, in the writer, where nobody waits for it."""
        if isinstance(results, Exception):
            self.path.write_text(json.dumps({"error": str(results)}))
            return
        names = {item.storage_data.relative_path for items in results.values() for item in items}
        digests = {name: asdict(digest_file(self.path.parent / name)) for name in names}
        items = {bucket: [_plain(item) for item in items] for bucket, items in results.items()}
        self.path.write_text(json.dumps({"items": items, "files": digests}))

    def get_nowait(self) -> dict[int, list[WriteResult]] | Exception:
        try:
            content = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError) as error:  # the writer died
            raise queue.Empty from error
        if "error" in content:
            return RuntimeError(content["error"])
        return {int(bucket): [_result(item) for item in items] for bucket, items in content["items"].items()}


def _plain(item: WriteResult) -> list[Any]:
    where, stored = item.index, item.storage_data
    offset = None if where.offset is None else list(where.offset)
    return [where.fqn, offset, where.index, item.size_in_bytes, stored.relative_path, stored.offset, stored.length]


def _result(item: list[Any]) -> WriteResult:
    fqn, offset, number, size, path, start, length = item
    index = MetadataIndex(fqn, None if offset is None else torch.Size(offset), number)
    return WriteResult(index, size, _StorageInfo(path, start, length))


@contextmanager
def results_in(folder: Path, rank: int) -> Iterator[None]:
    """While a save is planned, make its writer leave its results in ``folder``."""
    filesystem_async._results_queue = _Results(folder / f"{_PREFIX}{rank}")
    try:
        yield
    finally:
        filesystem_async._results_queue = None


def take_digests(folder: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file that all ranks wrote; removes the notes they left."""
    files: dict[str, FileEntry] = {}
    for path in folder.glob(f"{_PREFIX}*"):
        files |= {name: FileEntry(**entry) for name, entry in json.loads(path.read_text())["files"].items()}
        path.unlink()
    return files
