"""Results of a rank's background writer, in a file: the items it wrote, and the checksum of each of its files.

Megatron passes them through a manager process, which it spawns at the first save and which outlives a killed run. A
file in the unfinished folder is removed with the folder.
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

from prism_megatron.convert.manifest import FileEntry, digest_file
from prism_megatron.upstream.megatron import set_results_queue
from prism_megatron.upstream.torch_internals import MetadataIndex, StorageInfo, WriteResult

_PREFIX = ".written_"


@dataclass(frozen=True)
class _Results:
    """Replacement of Megatron's results queue: the writer puts once, the trainer gets once."""

    path: Path

    def put(self, results: dict[int, list[WriteResult]] | Exception) -> None:
        """Write the results and the files' checksums, which are computed here, in the background."""
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
    return WriteResult(index, size, StorageInfo(path, start, length))


@contextmanager
def results_in(folder: Path, rank: int) -> Iterator[None]:
    """Let the writer of a save that is planned in this context write its results to ``folder``."""
    set_results_queue(_Results(folder / f"{_PREFIX}{rank}"))
    try:
        yield
    finally:
        set_results_queue(None)


def take_digests(folder: Path) -> dict[str, FileEntry]:
    """Return size and checksum of every file that the ranks wrote, and remove the result files."""
    files: dict[str, FileEntry] = {}
    for path in folder.glob(f"{_PREFIX}*"):
        files |= {name: FileEntry(**entry) for name, entry in json.loads(path.read_text())["files"].items()}
        path.unlink()
    return files
