"""Reader and writer of Megatron's ``torch_dist`` checkpoints, one full parameter at a time, without ranks.

``megatron.core.dist_checkpointing`` reads these checkpoints at any parallel layout. Parameters of equal layers (and
experts) are stored under one key, with the layer (and expert) number as leading axes.
"""

from __future__ import annotations

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

from prism_megatron.convert.manifest import JOURNAL, FileEntry, HashedFile, TensorEntry, digest_file
from prism_megatron.convert.rules import Rule
from prism_megatron.convert.safetensors_writer import DTYPE_NAMES, DTYPES
from prism_megatron.errors import UserError
from prism_megatron.files import JSONLines, fsync, read_json_lines
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
_COMMON = "common_state/shard_0_1"  # Megatron's key of everything that is not a tensor
_BLOCK_BYTES = 64 << 20  # a block is read and written at once
_METADATA, _CONFIG = ".metadata", "metadata.json"


@dataclass(frozen=True)
class ShardedKey:
    """A parameter's key in Megatron's sharded state dict, and its index ``lead`` along the leading axes."""

    key: str
    lead: tuple[int, ...]


def sharded_key(rule: Rule) -> ShardedKey:
    """Return the key of a parameter, with its layer and expert numbers as the index."""
    lead: list[int] = []
    name = rule.megatron
    if match := _LAYER.fullmatch(name):
        name = match[1] + match[3]
        lead.append(int(match[2]))
    if match := _EXPERT.fullmatch(name):
        name = f"{match[1]}.experts{match[3]}"
        lead.append(int(match[2]))
    return ShardedKey(name, tuple(lead))


def whole_shapes(table: Sequence[Rule]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every key, including the leading axes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in table:
        if not rule.tied:
            where = sharded_key(rule)
            counts = tuple(number + 1 for number in where.lead)  # the last of each key has the highest numbers
            shapes[where.key] = (*counts, *rule.shard_shape(1))
    return shapes


class TorchDistReader:
    """Reader of the tensors of a distributed checkpoint, saved at any layout. A context manager.

    Raises UserError if the directory is no such checkpoint.
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
        """Return the full shape and the dtype of every key."""
        return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in self._entries.items()}

    def read(self, where: ShardedKey, prefix: str) -> Tensor:
        """Read one full parameter. Memory: the parameter and one block."""
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
        """Return the blocks of a key by their index along the leading axes."""
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
    """A part of a key's tensor, and its bytes in a file."""

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
    """Writer of a distributed checkpoint. Parameters are stored as the shards of ``tensor_parallel_size`` ranks.

    Each finished file is recorded in a journal: a writer in the same directory continues after it.
    """

    def __init__(self, directory: Path, prefix: str, tensor_parallel_size: int, file_bytes: int) -> None:
        self.directory, self.prefix, self.parts, self.file_bytes = directory, prefix, tensor_parallel_size, file_bytes
        self._journal = JSONLines(directory / JOURNAL, durable=True)
        self._files = [_file(line) for line in read_json_lines(directory / JOURNAL)]
        self._stream: HashedFile | None = None
        self._blocks: list[_Block] = []
        self._tensors: list[TensorEntry] = []

    @property
    def entries(self) -> list[TensorEntry]:
        """Return the HF tensors of all files."""
        return [entry for file in self._files for entry in file.tensors] + self._tensors

    def add(self, rule: Rule, parameter: Tensor) -> None:
        """Write one full parameter, in blocks: its shards, or rows of large shards."""
        where = sharded_key(rule)
        stream = self._open()
        for starts, block in blocks(rule, parameter, self.parts):
            offset = stream.position
            # torch.save would save all of the tensor that the block is a view of.
            torch.save(block.reshape(*(1,) * len(where.lead), *block.shape).clone(), cast("IO[bytes]", stream))
            sizes = (*(1,) * len(where.lead), *block.shape)
            length, dtype = stream.position - offset, DTYPE_NAMES[parameter.dtype]
            self._blocks.append(_Block(self.prefix + where.key, dtype, (*where.lead, *starts), sizes, offset, length))

    def end_tensors(self, entries: Iterable[TensorEntry]) -> None:
        """Record the HF tensors that were just completed, and end the file if it is large enough."""
        self._tensors += entries
        if self._stream is not None and self._stream.position >= self.file_bytes:
            self.close_file()

    def close_file(self) -> None:
        """End the current file, if there is one, and record it."""
        if self._stream is None:
            return
        self._stream.close()
        file = _File(self._stream.path.name, self._stream.entry, self._tensors, self._blocks)
        self._journal.append(asdict(file))
        self._files.append(file)
        self._stream, self._blocks, self._tensors = None, [], []

    def finish(self, table: Sequence[Rule]) -> dict[str, FileEntry]:
        """Write the files that describe the others; returns all files and their checksums."""
        self.close_file()
        self._journal.close()
        with HashedFile(self.directory / "common.distcp") as common:
            torch.save([{}], cast("IO[bytes]", common))  # Megatron stores everything else as a list of one dictionary
        name = common.path.name
        shapes = {self.prefix + key: shape for key, shape in whole_shapes(table).items()}
        storage: dict[MetadataIndex, StorageInfo] = {MetadataIndex(_COMMON): StorageInfo(name, 0, common.position)}
        tensors: dict[str, TensorStorageMetadata] = {}
        for file in self._files:
            for block in file.blocks:
                offsets, sizes = torch.Size(block.offsets), torch.Size(block.sizes)
                properties = TensorProperties(dtype=DTYPES[block.dtype])
                empty = TensorStorageMetadata(properties, torch.Size(shapes[block.key]), [])
                tensors.setdefault(block.key, empty).chunks.append(ChunkStorageMetadata(offsets, sizes))
                storage[MetadataIndex(block.key, offsets)] = StorageInfo(file.name, block.offset, block.length)
        for key, shape in shapes.items():
            stored = sum(chunk.sizes.numel() for chunk in tensors[key].chunks)
            assert stored == prod(shape), (key, stored, shape)
        metadata = Metadata(
            {_COMMON: BytesStorageMetadata(), **tensors}, storage_data=storage, storage_meta=StorageMeta()
        )
        with HashedFile(self.directory / _METADATA) as described:
            pickle.dump(metadata, described)
        save_config(CheckpointingConfig("torch_dist"), str(self.directory))
        fsync(self.directory / _CONFIG)
        return {
            name: common.entry,
            **{file.name: file.entry for file in self._files},
            _METADATA: described.entry,
            _CONFIG: digest_file(self.directory / _CONFIG),
        }

    def _open(self) -> HashedFile:
        if self._stream is None:
            number = 1 + max((int(file.name.split("_")[2]) for file in self._files), default=-1)
            self._stream = HashedFile(self.directory / f"__{number}_0.distcp")
        return self._stream


def blocks(rule: Rule, parameter: Tensor, parts: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield (start along each axis, values) of each block: shards of ``parts`` ranks, large ones split by rows."""
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


def _file(line: dict[str, Any]) -> _File:
    tensors = [TensorEntry.from_json(entry) for entry in line["tensors"]]
    found = [_Block(**b | {"offsets": tuple(b["offsets"]), "sizes": tuple(b["sizes"])}) for b in line["blocks"]]
    return _File(line["name"], FileEntry(**line["entry"]), tensors, found)
