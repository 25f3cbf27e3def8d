"""Reading and writing of HF checkpoint directories, by the tensor names of the released checkpoints.

The reader accepts the formats of all known writers. Names and shapes are those of the released checkpoints, which
transformers and vLLM load: experts stacked input-first, [E, H, gate | up] and [E, I, H]. ``save_pretrained`` of
transformers 5 writes them output-first.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from prism_megatron.convert.manifest import JOURNAL, digest_files, write_manifest
from prism_megatron.convert.rules import SCORE_HEAD
from prism_megatron.convert.safetensors_writer import DTYPES, INDEX, ShardWriter, TensorSpec
from prism_megatron.errors import UserError
from prism_megatron.files import directory_written_atomically, fsync

_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".distcp")
_NOT_SIDE_FILES = ("config.json", "metadata.json", "manifest.json")
_VALUE_HEAD_NAMES = (SCORE_HEAD, "v_head.summary.weight")
_CHECKED_AT_ONCE = 1 << 22  # elements
_MAPPED_BYTES = 64 << 20  # read pages stay in memory until the file is closed


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. Indexing it reads that part of the file.

    ``swapped``: in the file, the last two axes are transposed.
    """

    files: OpenFiles
    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    swapped: bool = False

    def __getitem__(self, index: Any) -> Tensor:
        stored = self.files.read(self.file, self.name)
        if not self.swapped:
            return stored[index]
        axes = index if isinstance(index, tuple) else (index,)
        first, rows, columns = axes + (slice(None),) * (3 - len(axes))
        return stored[first, columns, rows].transpose(-1, -2)


class OpenFiles:
    """Memory-mapped safetensors files, closed now and then so that mapped pages do not accumulate."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._mapped = 0

    def header(self, path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor. Raises UserError for a damaged file or an unsupported dtype."""
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or truncated ({error}); copy it again") from error
        header = {}
        for name in list(file.keys()):
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise UserError(f"{path}: {name} is {part.get_dtype()}; this trainer reads {', '.join(DTYPES)}")
            header[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
        return header

    def read(self, path: Path, name: str) -> Any:
        if self._mapped > _MAPPED_BYTES:
            self.close()
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        part = self._open[path].get_slice(name)
        return _Counted(part, self)

    def count(self, tensor: Tensor) -> None:
        self._mapped += tensor.numel() * tensor.element_size()

    def close(self) -> None:
        self._open.clear()
        self._mapped = 0


@dataclass(frozen=True)
class _Counted:
    part: Any
    files: OpenFiles

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self.part[index]
        self.files.count(tensor)
        return tensor


class HFWeights:
    """Tensors of an HF checkpoint directory, read in parts. A context manager.

    ``experts_swapped``: the experts are stored output-first. Raises UserError, naming the file, if the directory has no
    weights, a file is damaged or missing, or the index and the files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = OpenFiles()
        stored: dict[str, StoredTensor] = {}
        for path in _weight_files(directory):
            for name, (shape, dtype) in self._files.header(path).items():
                canonical = name.removeprefix("base_model.")  # the released trainer saves a backbone with this prefix
                if canonical in stored:
                    raise UserError(f"{directory}: {canonical} is in {stored[canonical].file.name} and in {path.name}")
                stored[canonical] = StoredTensor(self._files, path, name, shape, dtype)
        self.experts_swapped = _experts_swapped(directory, {name: t.shape for name, t in stored.items()})
        if self.experts_swapped:
            for name, tensor in stored.items():
                if name.endswith((_UP, _DOWN)):
                    experts, rows, columns = tensor.shape
                    stored[name] = StoredTensor(
                        self._files, tensor.file, tensor.name, (experts, columns, rows), tensor.dtype, swapped=True
                    )
        self._tensors: dict[str, StoredTensor | Tensor] = {**stored}
        self._add_value_head()

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    def lazy(self, name: str) -> StoredTensor | Tensor:
        """Return a tensor with its shape and dtype; indexing it reads its values."""
        if name not in self._tensors:
            raise UserError(f"{self.directory} has no tensor {name}; is it a checkpoint of another model?")
        return self._tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.lazy(name)[:]

    def _add_value_head(self) -> None:
        """Add a score head that is stored in a file of its own, with trl's name (spec 8.2)."""
        for path in (self.directory / "value_head.safetensors", self.directory / "value_head.pt"):
            if not path.is_file():
                continue
            try:
                # weights_only: unpickling must not execute code.
                stored = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"{path} is damaged or truncated ({reason}); copy it again") from error
            names = [n for n in _VALUE_HEAD_NAMES if n in stored]
            if len(names) != 1:
                raise UserError(f"{path} holds {sorted(stored)}; it must hold one of {', '.join(_VALUE_HEAD_NAMES)}")
            known = self._tensors.setdefault(SCORE_HEAD, stored[names[0]])
            if not torch.equal(known[:].float(), stored[names[0]].float()):
                raise UserError(f"{path} and {SCORE_HEAD} of {self.directory} differ; remove one of them")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            raise UserError(f"{directory} holds no model.safetensors (or its index); give a complete HF checkpoint")
        return [directory / "model.safetensors"]
    try:
        files = sorted(set(json.loads(index.read_bytes().decode())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}); copy the checkpoint again") from error
    if not files:
        raise UserError(f"{index} lists no files; copy the checkpoint again")
    for name in files:
        if not (directory / name).is_file():
            raise UserError(f"{index} lists {name}, which is missing; copy the checkpoint again")
    return [directory / name for name in files]


def _experts_swapped(directory: Path, shapes: dict[str, Sequence[int]]) -> bool:
    """Return whether stacked experts are output-first ([E, 2I, H] and [E, H, I]), from the two shapes together.

    One of them alone can be square, but both orders cannot fit both shapes.
    """
    found = set()
    for name, up in shapes.items():
        if not name.endswith(_UP):
            continue
        down = shapes.get(name.removesuffix(_UP) + _DOWN, ())
        fits = [
            swapped
            for swapped, (hidden, width) in ((False, up[1:]), (True, reversed(up[1:])))
            if tuple(down) == (up[0], *((hidden, width / 2) if swapped else (width / 2, hidden)))
        ]
        if len(fits) != 1:
            raise UserError(f"{directory}: {name} {tuple(up)} and its down_proj {tuple(down)} fit no expert layout")
        found.add(fits[0])
    if len(found) > 1:
        raise UserError(f"{directory}: experts of some layers are stored input-first, of others output-first")
    return found == {True}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise UserError if a value is infinite or not a number."""
    for piece in torch.split(tensor.detach().flatten(), _CHECKED_AT_ONCE):
        if piece.is_floating_point() and not bool(torch.isfinite(torch.stack(torch.aminmax(piece))).all()):
            raise UserError(f"{name} holds values that are infinite or not a number; this checkpoint is broken")


def save_hf(
    directory: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    template: Path,
    config_changes: dict[str, Any] | None = None,
    shard_bytes: int = 5 << 30,
) -> None:
    """Write a checkpoint directory that HF and vLLM load, with a manifest of checksums.

    The directory appears when it is complete, and replaces one of that name.

    Args:
        directory: path to write.
        shapes: shape and dtype of every tensor by name, in the order of ``tensors``.
        tensors: names and full tensors, each written before the next is requested.
        template: directory that all files other than weights are copied from.
        config_changes: changes to the ``config.json`` of ``template``; dictionaries in it are merged.
        shard_bytes: largest size of a file.

    Raises:
        UserError: a value is infinite or not a number.
    """
    specs = [TensorSpec(name, shape, dtype) for name, (shape, dtype) in shapes.items()]
    with directory_written_atomically(directory) as partial:
        writer = ShardWriter(partial, specs, shard_bytes)
        for name, tensor in tensors:
            check_finite(name, tensor)
            writer.add(name, [tensor])
        files = writer.finish()
        (partial / JOURNAL).unlink()
        side_files = copy_side_files(template, partial, config_changes or {})
        for name in side_files:
            fsync(partial / name)
        write_manifest(partial, files | digest_files(partial, side_files), writer.entries)


def copy_side_files(template: Path, directory: Path, config_changes: dict[str, Any]) -> list[str]:
    """Copy tokenizer, processor, templates and licence, everything except weights. Returns the file names."""
    names = [
        path.name
        for path in sorted(template.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHTS)
        and path.name not in _NOT_SIDE_FILES
    ]
    for name in names:
        shutil.copyfile(template / name, directory / name)
    config = json.loads((template / "config.json").read_text())
    if _merged(config, config_changes) == config:
        shutil.copyfile(template / "config.json", directory / "config.json")
    else:
        text = json.dumps(_merged(config, config_changes), indent=2) + "\n"
        (directory / "config.json").write_text(text)
    return [*names, "config.json"]


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(base.get(key, {}), value) if isinstance(value, dict) else value for key, value in changes.items()
    }
    return base | nested
