"""Writing safetensors shards one tensor at a time: nothing but the piece in hand is in memory.

The format puts its header first. Room for it is left at the start of each shard and filled, with spaces up to the data,
when the shard is closed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from prism_megatron.convert.manifest import JOURNAL, TensorEntry, append_line, read_lines

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ROOM = 1 << 17
_ENTRY_ROOM = 96  # of a header entry, without its name


class ShardWriter:
    """The safetensors files of a directory, with their index. ``entries`` says what was written.

    Each closed shard is noted in a journal: a writer opened on the same directory goes on after the last one.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.directory, self.shard_bytes = directory, shard_bytes
        self.shards: list[list[TensorEntry]] = [
            [TensorEntry(**entry | {"shape": tuple(entry["shape"])}) for entry in shard]
            for shard in read_lines(directory / JOURNAL)
        ]
        self._header: dict[str, Any] = {}
        self._current: list[TensorEntry] = []
        self._file: IO[bytes] | None = None
        self._offset = 0

    @property
    def entries(self) -> list[TensorEntry]:
        return [entry for shard in self.shards for entry in shard] + self._current

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int], parts: Iterable[Tensor]) -> TensorEntry:
        """Append a tensor given as consecutive parts of its C-order values."""
        size = prod(shape) * dtype.itemsize
        room = sum(len(key) + _ENTRY_ROOM for key in (*self._header, name))
        if self._file is not None and (self._offset + size > self.shard_bytes or room > _HEADER_ROOM):
            self._close()
        if self._file is None:
            self._file = (self.directory / _shard_name(len(self.shards))).open("wb")
            self._file.seek(_HEADER_ROOM)
        digest, written = hashlib.sha256(), 0
        with ThreadPoolExecutor(1) as hashing:
            for part in parts:
                assert part.dtype == dtype, (name, part.dtype, dtype)
                data = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                hashed = hashing.submit(digest.update, data)
                self._file.write(data)
                hashed.result()  # no more than one part in memory
                written += data.nbytes
        assert written == size, f"{name}: {written} bytes given, {size} announced"
        kind = DTYPE_NAMES[dtype]
        self._header[name] = {
            "dtype": kind,
            "shape": list(shape),
            "data_offsets": [self._offset, self._offset + size],
        }
        self._offset += size
        entry = TensorEntry(name, kind, tuple(shape), size, digest.hexdigest())
        self._current.append(entry)
        return entry

    def finish(self) -> list[str]:
        """Close the last shard, give the files their final names and write the index. Returns the file names."""
        if self._file is not None or not self.shards:
            self._close()
        count = len(self.shards)
        files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        files = files if count > 1 else ["model.safetensors"]
        for number, file in enumerate(files):
            if (self.directory / _shard_name(number)).is_file():  # not renamed by an interrupted run
                os.replace(self.directory / _shard_name(number), self.directory / file)
        if count == 1:
            return files
        weight_map = {entry.name: file for file, shard in zip(files, self.shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(e.bytes for e in self.entries)}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        return [*files, "model.safetensors.index.json"]

    def _close(self) -> None:
        if self._file is None:
            self._file = (self.directory / _shard_name(len(self.shards))).open("wb")
            self._file.seek(_HEADER_ROOM)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        room = _HEADER_ROOM - 8
        assert len(header) <= room
        self._file.seek(0)
        self._file.write(room.to_bytes(8, "little") + header.ljust(room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        append_line(self.directory / JOURNAL, [asdict(entry) for entry in self._current])
        self.shards.append(self._current)
        self._header, self._current, self._file, self._offset = {}, [], None, 0


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"
