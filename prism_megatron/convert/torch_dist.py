"""Megatron's distributed checkpoints without ranks: whole parameters in and out of ``torch_dist`` files, one at a time.

What is written here is what ``megatron.core.dist_checkpointing`` reads, at any parallel layout. Parameters of equal
layers (and experts) are stored under one key, with the layer (and expert) number as leading axes.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from prism_megatron.convert.manifest import JOURNAL, FileEntry, TensorEntry, append_line, digest_file, read_lines
from prism_megatron.convert.rules import Rule
from prism_megatron.convert.safetensors_writer import DTYPE_NAMES, DTYPES
from prism_megatron.errors import UserError
from prism_megatron.files import fsync
from prism_megatron.upstream.megatron import CheckpointingConfig, save_config
from prism_megatron.upstream.torch_internals import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    create_file_view,
)

_LAYER = re.compile(r"(decoder\.layers)\.(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)(\..*)")
_COMMON = "common_state/shard_0_1"  # Megatron's place for what is not a tensor
_BLOCK_BYTES = 64 << 20  # blocks are read and written whole
_METADATA, _CONFIG = ".metadata", "metadata.json"


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: under ``key``, at ``lead`` of the leading axes."""

    key: str
    lead: tuple[int, ...]


def place(rule: Rule) -> Place:
    """The key of Megatron's sharded state dict for a parameter, and its layer and expert."""
    lead: list[int] = []
    name = rule.megatron
    if match := _LAYER.fullmatch(name):
        name = match[1] + match[3]
        lead.append(int(match[2]))
    if match := _EXPERT.fullmatch(name):
        name = f"{match[1]}.experts{match[3]}"
        lead.append(int(match[2]))
    return Place(name, tuple(lead))


def whole_shapes(table: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Shape of every key, leading axes included."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in table:
        if not rule.tied:
            where = place(rule)
            counts = tuple(number + 1 for number in where.lead)  # the last of each key has the highest numbers
            shapes[where.key] = (*counts, *rule.shard_shape(1))
    return shapes


class TorchDistReader:
    """The tensors of a distributed checkpoint, in whatever blocks they were saved (close it when done).

    Raises UserError if the directory is not one.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / _METADATA).is_file() or not (directory / _CONFIG).is_file():
            raise UserError(f"{directory} is not a Megatron checkpoint: it has no {_METADATA} and {_CONFIG}")
        self.directory = directory
        metadata = FileSystemReader(directory).read_metadata()
        self._storage = metadata.storage_data
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._index: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._files: dict[str, Any] = {}

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Whole shape and dtype of every key."""
        return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in self._entries.items()}

    def read(self, where: Place, prefix: str) -> Tensor:
        """One parameter, put together from its blocks; its own memory, and one block more, is all that is used."""
        key, depth = prefix + where.key, len(where.lead)
        entry = self._entries[key]
        whole = torch.empty(tuple(entry.size)[depth:], dtype=entry.properties.dtype)
        filled = 0
        for chunk in self._chunks(key, depth).get(where.lead, []):
            block = self._load(MetadataIndex(key, chunk.offsets))
            inside = block[tuple(n - start for n, start in zip(where.lead, chunk.offsets, strict=False))]
            spans = zip(chunk.offsets[depth:], inside.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in spans)] = inside
            filled += inside.numel()
        if filled != whole.numel():
            raise UserError(f"{self.directory}: {key} {where.lead} has {filled} of {whole.numel()} values")
        return whole

    def _chunks(self, key: str, depth: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """Blocks of a key by the leading numbers they hold."""
        if (key, depth) not in self._index:
            index: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
            for chunk in self._entries[key].chunks:
                spans = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for lead in product(*(range(start, start + size) for start, size in spans)):
                    index.setdefault(lead, []).append(chunk)
            self._index[key, depth] = index
        return self._index[key, depth]

    def _load(self, index: MetadataIndex) -> Tensor:
        stored = self._storage[index]
        if stored.relative_path not in self._files:
            self._files[stored.relative_path] = (self.directory / stored.relative_path).open("rb")
        view: Any = create_file_view(self._files[stored.relative_path], stored.offset, stored.length)
        block: Tensor = torch.load(view, weights_only=True, map_location="cpu")
        return block


@dataclass(frozen=True)
class _Block:
    """A piece of a key, and where its bytes are."""

    key: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class _File:
    name: str
    entry: FileEntry
    tensors: list[TensorEntry]
    blocks: list[_Block]


class TorchDistWriter:
    """The files of a distributed checkpoint. Parameters are cut into the shards of ``tensor_parallel_size`` ranks.

    Each closed file is noted in a journal: a writer opened on the same directory goes on after the last one.
    """

    def __init__(self, directory: Path, prefix: str, tensor_parallel_size: int, file_bytes: int) -> None:
        self.directory, self.prefix, self.parts, self.file_bytes = directory, prefix, tensor_parallel_size, file_bytes
        self._files = [_file(line) for line in read_lines(directory / JOURNAL)]
        self._stream: _HashedFile | None = None
        self._blocks: list[_Block] = []
        self._tensors: list[TensorEntry] = []

    @property
    def entries(self) -> list[TensorEntry]:
        """The HF tensors of all files."""
        return [entry for file in self._files for entry in file.tensors] + self._tensors

    def add(self, rule: Rule, parameter: Tensor) -> None:
        """Write one whole parameter, in blocks that are shards or, of large ones, rows of shards."""
        where = place(rule)
        stream = self._open()
        for starts, block in blocks(rule, parameter, self.parts):
            offset = stream.position
            # A block is often a view; only its own values must be saved.
            torch.save(block.reshape(*(1,) * len(where.lead), *block.shape).clone(), cast("IO[bytes]", stream))
            sizes = (*(1,) * len(where.lead), *block.shape)
            length, dtype = stream.position - offset, DTYPE_NAMES[parameter.dtype]
            self._blocks.append(_Block(self.prefix + where.key, dtype, (*where.lead, *starts), sizes, offset, length))

    def end_tensors(self, entries: Iterable[TensorEntry]) -> None:
        """Note which HF tensors were just completed, and begin another file if this one is large enough."""
        self._tensors += entries
        if self._stream is not None and self._stream.position >= self.file_bytes:
            self.close_file()

    def close_file(self) -> None:
        """End the current file, if there is one, for good."""
        if self._stream is None:
            return
        name, entry = self._stream.close()
        file = _File(name, entry, self._tensors, self._blocks)
        append_line(self.directory / JOURNAL, asdict(file))
        self._files.append(file)
        self._stream, self._blocks, self._tensors = None, [], []

    def finish(self, table: Sequence[Rule]) -> dict[str, FileEntry]:
        """Write what makes the files a checkpoint. Returns all files and their checksums."""
        self.close_file()
        common = _HashedFile(self.directory / "common.distcp")
        # Megatron keeps what is not a tensor as a list of one dictionary.
        torch.save([{}], cast("IO[bytes]", common))
        length = common.position
        name, entry = common.close()
        shapes = {self.prefix + key: shape for key, shape in whole_shapes(table).items()}
        storage: dict[MetadataIndex, StorageInfo] = {MetadataIndex(_COMMON): StorageInfo(name, 0, length)}
        tensors: dict[str, TensorStorageMetadata] = {}
        for file in self._files:
            for block in file.blocks:
                offsets, sizes = torch.Size(block.offsets), torch.Size(block.sizes)
                properties = TensorProperties(dtype=DTYPES[block.dtype])
                empty = TensorStorageMetadata(properties, torch.Size(shapes[block.key]), [])
                tensors.setdefault(block.key, empty).chunks.append(ChunkStorageMetadata(offsets, sizes))
                storage[MetadataIndex(block.key, offsets)] = StorageInfo(file.name, block.offset, block.length)
        for key, shape in shapes.items():
            held = sum(chunk.sizes.numel() for chunk in tensors[key].chunks)
            assert held == prod(shape), (key, held, shape)
        metadata = Metadata(
            {_COMMON: BytesStorageMetadata(), **tensors}, storage_data=storage, storage_meta=StorageMeta()
        )
        with (self.directory / _METADATA).open("wb") as file_:
            pickle.dump(metadata, file_)
        save_config(CheckpointingConfig("torch_dist"), str(self.directory))
        for path in (self.directory / _METADATA, self.directory / _CONFIG):
            fsync(path)
        return {
            name: entry,
            **{file.name: file.entry for file in self._files},
            **{name: digest_file(self.directory / name) for name in (_METADATA, _CONFIG)},
        }

    def _open(self) -> _HashedFile:
        if self._stream is None:
            self._stream = _HashedFile(self.directory / f"__{len(self._files)}_0.distcp")
        return self._stream


def blocks(rule: Rule, parameter: Tensor, parts: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(Start along each axis, values) of each block: shards of ``parts`` ranks, cut further by rows where large."""
    layout = rule.layout
    count = 1 if layout.axis is None else layout.megatron_sections * (parts if rule.expert is None else 1)
    axis = layout.megatron_axis
    start = 0
    for shard in parameter.chunk(count, axis):
        row_bytes = shard.nbytes // shard.shape[0]
        first_row = 0
        for rows in torch.split(shard, max(_BLOCK_BYTES // row_bytes, 1)):
            starts = [0] * parameter.dim()
            starts[axis] = start
            starts[0] += first_row
            yield tuple(starts), rows
            first_row += rows.shape[0]
        start += shard.shape[axis]


class _HashedFile(io.RawIOBase):
    """A file that is only appended to, and its checksum."""

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

    def close(self) -> Any:
        if self.closed:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        super().close()
        return self.path.name, FileEntry(self.position, self._digest.hexdigest())


def _file(line: dict[str, Any]) -> _File:
    tensors = [TensorEntry(**e | {"shape": tuple(e["shape"])}) for e in line["tensors"]]
    found = [_Block(**b | {"offsets": tuple(b["offsets"]), "sizes": tuple(b["sizes"])}) for b in line["blocks"]]
    return _File(line["name"], FileEntry(**line["entry"]), tensors, found)
