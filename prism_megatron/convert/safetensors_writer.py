"""Writer of safetensors shards, one tensor at a time, with no more than a part of a tensor in memory.

A file begins with its header. All shapes are therefore given first, and the shards planned from them; the checksum of a
file is then computed while it is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_megatron.convert.manifest import JOURNAL, FileEntry, HashedFile, TensorEntry
from prism_megatron.files import JSONLines, read_json_lines

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes, of the data behind the header


class TensorSpec(NamedTuple):
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """The safetensors files of a directory, and their index.

    Each finished shard is recorded in a journal: a writer of the same tensors in the same directory continues with the
    next shard.

    Attributes:
        entries: the tensors written so far, in order.
        files: sizes and checksums of the finished shards by file name.
    """

    def __init__(self, directory: Path, tensors: Sequence[TensorSpec], shard_bytes: int) -> None:
        self.directory = directory
        self.entries: list[TensorEntry] = []
        self.files: dict[str, FileEntry] = {}
        shards = plan_shards(tensors, shard_bytes)
        count = len(shards)
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        self._shards = dict(zip(names if count > 1 else ["model.safetensors"], shards, strict=True))
        self._journal = JSONLines(directory / JOURNAL, durable=True)
        for line in read_json_lines(directory / JOURNAL):
            self.files[line["file"]] = FileEntry(**line["entry"])
            self.entries += [TensorEntry.from_json(entry) for entry in line["tensors"]]
        self._pending = iter([(name, shard) for name, shard in self._shards.items() if name not in self.files])
        self._file: HashedFile | None = None
        self._remaining: list[TensorSpec] = []

    def add(self, name: str, parts: Iterable[Tensor]) -> TensorEntry:
        """Append the next planned tensor, given as consecutive parts of its C-order values."""
        if self._file is None:
            self._open()
        assert self._file is not None
        spec = self._remaining.pop(0)
        assert spec.name == name, f"{name} given, {spec.name} is next"
        digest, start = hashlib.sha256(), self._file.position
        with ThreadPoolExecutor(1) as hashing:
            for part in parts:
                assert part.dtype == spec.dtype, (name, part.dtype, spec.dtype)
                data = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                hashed = hashing.submit(digest.update, data)  # while the file hashes and writes the same bytes
                self._file.write(data)
                hashed.result()  # no more than one part in memory
        written = self._file.position - start
        assert written == spec.bytes, f"{name}: {written} bytes given, {spec.bytes} planned"
        entry = TensorEntry(name, DTYPE_NAMES[spec.dtype], spec.shape, spec.bytes, digest.hexdigest())
        self.entries.append(entry)
        if not self._remaining:
            self._close()
        return entry

    def finish(self) -> dict[str, FileEntry]:
        """Write the index, if there are several shards; returns all files and their checksums."""
        assert self._file is None, f"{self._remaining[0].name} was planned and not written"
        assert len(self.files) == len(self._shards)
        self._journal.close()
        if len(self._shards) == 1:
            return self.files
        weight_map = {spec.name: name for name, shard in self._shards.items() for spec in shard}
        index = {"metadata": {"total_size": sum(entry.bytes for entry in self.entries)}, "weight_map": weight_map}
        with HashedFile(self.directory / INDEX) as file:
            file.write((json.dumps(index, indent=2) + "\n").encode())
        return {**self.files, INDEX: file.entry}

    def _open(self) -> None:
        """Begin the next shard with its header."""
        name, shard = next(self._pending)
        self._file, self._remaining = HashedFile(self.directory / name), list(shard)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            offsets = [offset, offset + spec.bytes]
            header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            offset += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        """Finish the current shard and record it."""
        assert self._file is not None
        self._file.close()
        name, entry = self._file.path.name, self._file.entry
        tensors = self.entries[-len(self._shards[name]) :]
        self._journal.append({"file": name, "entry": asdict(entry), "tensors": [asdict(tensor) for tensor in tensors]})
        self.files[name] = entry
        self._file = None


def plan_shards(tensors: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Split tensors, in order, into shards of at most ``shard_bytes``, or of a single larger tensor."""
    assert tensors, "no tensors to write"
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in tensors:
        if not shards or size + spec.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return shards
