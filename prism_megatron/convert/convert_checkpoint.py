"""Whole checkpoints from HF to Megatron and back, tensor by tensor, with neither a model nor ranks.

Both directions check every tensor's name, shape and values, leave a manifest with checksums, go on where an interrupted
run stopped and let the directory appear under its name only when it is complete. A converted Megatron directory keeps
the HF directory's other files, so training starts from it as from the HF one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import ParallelConfig
from prism_megatron.convert.export_plan import units
from prism_megatron.convert.hf_io import HFWeights, StoredTensor, check_finite, copy_side_files, replace_directory
from prism_megatron.convert.manifest import (
    JOURNAL,
    TensorEntry,
    digest_files,
    first_fault,
    read_manifest,
    write_manifest,
)
from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
from prism_megatron.convert.rules import EMBEDDING, OUTPUT, PARTS, SCORE_HEAD, Rule
from prism_megatron.convert.safetensors_writer import DTYPE_NAMES, ShardWriter
from prism_megatron.convert.torch_dist import TorchDistReader, TorchDistWriter, place, whole_shapes
from prism_megatron.convert.transfer import check_source, check_tied
from prism_megatron.errors import UserError
from prism_megatron.files import fsync, write_atomic
from prism_megatron.model.sizes import HFSizes, read_sizes

_INPUTS = "inputs.json"  # what an unfinished directory is made from
Report = Callable[[int, int], object]  # called with bytes done and bytes in all


@dataclass(frozen=True)
class Converted:
    """A finished directory and what is in it."""

    directory: Path
    tensors: list[TensorEntry]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.tensors)


def hf_to_megatron(
    hf: Path,
    out: Path,
    parallel: ParallelConfig,
    file_bytes: int = 1 << 30,
    report: Report = lambda done, total: None,
) -> Converted:
    """Write ``out`` as a distributed checkpoint that loads at any layout and needs no resharding at ``parallel``'s.

    Parameters are stored in the blocks that tensor-parallel ranks hold, and a pipeline stage begins a file; layers and
    experts are blocks of their own at any degree. Raises UserError at tensors that are missing, extra, of another
    shape or not finite, and where ``parallel`` does not fit the model.
    """
    sizes = read_sizes(hf)
    with HFWeights(hf) as weights:
        part, table = _part_and_table(sizes, weights)
        check_source(table, weights)
        _check_layout(parallel, sizes)
        about = {
            "part": part,
            "experts_swapped": weights.experts_swapped,
            "stores_tied_output": sizes.tie_embeddings and OUTPUT in weights.names,
        }
        if about["stores_tied_output"]:
            check_tied(weights[EMBEDDING], weights[OUTPUT])
        with _unfinished(out, {"hf": _fingerprint(hf), "parallel": asdict(parallel)}) as partial:
            writer = TorchDistWriter(partial, f"{part}.", parallel.tensor_model_parallel_size, file_bytes)
            names = {name for rule in table for name in rule.hf}
            total = sum(_bytes(weights.lazy(name)) for name in names)
            done = {entry.name for entry in writer.entries}
            count = sum(entry.bytes for entry in writer.entries)
            stage = 0
            for unit in units(table):
                if unit[0].hf[0] in done:
                    continue
                if (here := _stage(unit[0], sizes, parallel)) != stage:
                    stage = here
                    writer.close_file()
                entries = _store(unit, weights, writer)
                writer.end_tensors(entries)
                count += sum(entry.bytes for entry in entries)
                report(count, total)
            files = writer.finish(table)
            files |= digest_files(partial, copy_side_files(hf, partial, {}))
            _check_complete(names, writer.entries)
            write_manifest(partial, files, writer.entries, about)
    return Converted(out, writer.entries)


def megatron_to_hf(
    megatron: Path,
    out: Path,
    template: Path | None = None,
    part: str | None = None,
    verify: Path | None = None,
    shard_bytes: int = 5 << 30,
    report: Report = lambda done, total: None,
) -> Converted:
    """Write ``out`` as an HF checkpoint from a converted directory or from one iteration of a training run.

    ``template`` gives config, tokenizer and processor to the latter; ``part`` tells policy and discriminator apart.
    With ``verify`` every tensor must be, bit by bit, that of another HF directory. Raises UserError as
    :func:`hf_to_megatron`, and for files that do not have their checksums.
    """
    if fault := first_fault(megatron):
        raise UserError(f"{megatron}: {fault}; convert or save it again")
    template = template or megatron
    sizes = read_sizes(template)
    about = read_manifest(megatron)  # whole, as was just checked
    with TorchDistReader(megatron) as reader:
        stored = reader.tensors()
        prefix = f"{part or about.get('part') or _only_part(megatron, stored)}."
        table = _stored_table(sizes, stored, prefix)
        _check_stored(table, stored, prefix)
        swapped = bool(about.get("experts_swapped"))
        with _unfinished(out, {"megatron": _fingerprint(megatron), "template": _fingerprint(template)}) as partial:
            writer = ShardWriter(partial, shard_bytes)
            outputs = list(_outputs(table, _LastRead(reader, prefix), stored, swapped))
            if about.get("stores_tied_output"):
                outputs += [replace(output, name=OUTPUT) for output in outputs if output.name == EMBEDDING]
            total = sum(output.bytes for output in outputs)
            done = {entry.name for entry in writer.entries}
            count = sum(entry.bytes for entry in writer.entries)
            for output in outputs:
                if output.name not in done:
                    count += writer.add(output.name, output.dtype, output.shape, output.parts()).bytes
                    report(count, total)
            files = digest_files(partial, [*writer.finish(), *copy_side_files(template, partial, {})])
            _check_complete({output.name for output in outputs}, writer.entries)
            _check_unchanged(about["tensors"], writer.entries)
            if verify is not None:
                verify_against(verify, writer.entries)
            write_manifest(partial, files, writer.entries)
    return Converted(out, writer.entries)


@dataclass(frozen=True)
class _Output:
    """An HF tensor to be, and its values part by part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class _LastRead:
    """Reads parameters and keeps the last one, which several HF tensors may be made of."""

    reader: TorchDistReader
    prefix: str
    name: str = ""
    parameter: Tensor | None = None

    def __call__(self, rule: Rule) -> Tensor:
        if self.parameter is None or self.name != rule.megatron:
            self.parameter = None  # before the next takes its memory
            self.parameter = rule.layout.trimmed(self.reader.read(place(rule), self.prefix))
            check_finite(rule.megatron, self.parameter)
            self.name = rule.megatron
        return self.parameter


def _outputs(
    table: Sequence[Rule],
    read: _LastRead,
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]],
    swapped: bool,
) -> Iterator[_Output]:
    for unit in units(table):
        dtype = stored[read.prefix + place(unit[0]).key][1]
        for position, (name, shape) in enumerate(zip(unit[0].hf, unit[0].shapes, strict=True)):
            if unit[0].expert is not None and swapped:
                shape = (shape[0], shape[2], shape[1])

            def parts(unit: list[Rule] = unit, position: int = position) -> Iterator[Tensor]:
                for rule in unit:
                    tensor = rule.layout.split(read(rule))[position]
                    yield tensor.T if rule.expert is not None and swapped else tensor

            yield _Output(name, dtype, shape, parts)


def _store(unit: list[Rule], weights: HFWeights, writer: TorchDistWriter) -> list[TensorEntry]:
    """Write the parameters of one unit; returns what their HF tensors were, as they are stored."""
    tensors = [weights.lazy(name) for name in unit[0].hf]
    digests = [hashlib.sha256() for _ in tensors]
    swapped = unit[0].expert is not None and weights.experts_swapped
    with ThreadPoolExecutor(len(tensors)) as hashing:
        for rule in unit:
            parts = [source[:] for source in rule.sources(tensors)]
            for part in parts:
                check_finite(", ".join(rule.hf), part)
            # While the writer takes the file's checksum of the same values, laid out otherwise.
            hashed = [hashing.submit(_hash, *pair, swapped) for pair in zip(digests, parts, strict=True)]
            writer.add(rule, rule.layout.join(parts))
            for one in hashed:
                one.result()
    return [
        _entry(name, tensor, swapped, digest.hexdigest())
        for name, tensor, digest in zip(unit[0].hf, tensors, digests, strict=True)
    ]


def _hash(digest: Any, tensor: Tensor, swapped: bool) -> None:
    """Append a tensor's values as they are stored."""
    digest.update((tensor.T if swapped else tensor).contiguous().flatten().view(torch.uint8).numpy())


def verify_against(hf: Path, entries: Sequence[TensorEntry]) -> None:
    """Raises UserError unless an HF directory holds exactly these tensors, bit by bit."""
    with HFWeights(hf) as weights:
        _check_complete(weights.names, entries)
        for entry in entries:
            tensor = weights.lazy(entry.name)
            swapped = getattr(tensor, "swapped", False)
            digest = hashlib.sha256()
            for part in (tensor[i] for i in range(entry.shape[0])) if swapped else [tensor[:]]:
                _hash(digest, part, swapped)
            if _entry(entry.name, tensor, swapped, digest.hexdigest()) != entry:
                raise UserError(f"{entry.name} is not what {hf} holds")


def _entry(name: str, tensor: StoredTensor | Tensor, swapped: bool, sha256: str) -> TensorEntry:
    shape = tuple(tensor.shape)
    stored = (shape[0], shape[2], shape[1]) if swapped else shape
    return TensorEntry(name, DTYPE_NAMES[tensor.dtype], stored, _bytes(tensor), sha256)


def _bytes(tensor: StoredTensor | Tensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _part_and_table(sizes: HFSizes, weights: HFWeights) -> tuple[str, list[Rule]]:
    if SCORE_HEAD not in weights.names:
        return "policy", policy_table(sizes)
    if sizes.num_experts is None:
        raise UserError(f"{weights.directory} has a score head but no experts in config.json; upcycle it first")
    return "discriminator", discriminator_table(sizes, sizes.num_experts, weights.lazy(SCORE_HEAD).shape[0])


def _stored_table(sizes: HFSizes, stored: dict[str, tuple[tuple[int, ...], torch.dtype]], prefix: str) -> list[Rule]:
    head = stored.get(f"{prefix}score_heads.weight")
    if head is None:
        return policy_table(sizes)
    if sizes.num_experts is None:
        raise UserError("the checkpoint is a discriminator; give the config.json of one with --template")
    return discriminator_table(sizes, sizes.num_experts, head[0][0])


def _only_part(directory: Path, stored: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    held = [part for part in PARTS if any(key.startswith(f"{part}.") for key in stored)]
    if len(held) != 1:
        raise UserError(f"{directory} holds {' and '.join(held) or 'no model'}; say which with --part")
    return held[0]


def _check_stored(table: Sequence[Rule], stored: dict[str, tuple[tuple[int, ...], torch.dtype]], prefix: str) -> None:
    expected = {prefix + key: shape for key, shape in whole_shapes(table).items()}
    filled_up = {prefix + place(rule).key for rule in table if rule.layout.rows is not None}
    held = {key: shape for key, (shape, _) in stored.items() if key.startswith(prefix)}
    _compare("the checkpoint", expected.keys(), held.keys())
    for key, shape in expected.items():
        fits = held[key] == shape or (key in filled_up and held[key][0] > shape[0] and held[key][1:] == shape[1:])
        if not fits:
            raise UserError(f"{key} has shape {held[key]}, not {shape}; config.json is of another model")


def _check_complete(names: set[str], entries: Sequence[TensorEntry]) -> None:
    _compare("the result", names, {entry.name for entry in entries})
    assert len(entries) == len(names), "a tensor was written twice"


def _compare(what: str, expected: Collection[str], held: Collection[str]) -> None:
    if missing := sorted(set(expected) - set(held)):
        raise UserError(f"{what} lacks {len(missing)} tensors of this model: {', '.join(missing[:3])}")
    if extra := sorted(set(held) - set(expected)):
        raise UserError(f"{what} holds {len(extra)} tensors this model has no place for: {', '.join(extra[:3])}")


def _check_unchanged(before: Sequence[TensorEntry], after: Sequence[TensorEntry]) -> None:
    """What was converted once must come back as it was; a training checkpoint has no before."""
    known = {entry.name: entry for entry in before}
    for entry in after:
        if known and entry.name in known and known[entry.name] != entry:
            raise UserError(f"{entry.name} is not what was converted: {entry} against {known[entry.name]}")


def _check_layout(parallel: ParallelConfig, sizes: HFSizes) -> None:
    degrees, tp = sizes.degrees(), parallel.tensor_model_parallel_size
    for name, count, option, degree in (
        ("num_attention_heads", degrees.num_attention_heads, "--tp", tp),
        ("num_key_value_heads", degrees.num_query_groups, "--tp", tp),
        ("vision num_heads", degrees.vision_heads, "--tp", tp),
        ("num_experts", degrees.num_moe_experts or 1, "--ep", parallel.expert_model_parallel_size),
    ):
        if degree < 1 or count % degree:
            raise UserError(f"{name} ({count}) must be divisible by {option} ({degree})")
    if not 1 <= parallel.pipeline_model_parallel_size <= degrees.num_layers:
        raise UserError(
            f"--pp ({parallel.pipeline_model_parallel_size}) must be between 1 and num_hidden_layers "
            f"({degrees.num_layers})"
        )


def _stage(rule: Rule, sizes: HFSizes, parallel: ParallelConfig) -> int:
    """Pipeline stage of a parameter, for the choice of its file."""
    if not rule.megatron.startswith("decoder.layers."):
        return parallel.pipeline_model_parallel_size - 1 if rule.megatron.startswith(("decoder.", "output_")) else 0
    per_stage = -(-sizes.text["num_hidden_layers"] // parallel.pipeline_model_parallel_size)
    return int(place(rule).lead[0] // per_stage)


def _fingerprint(directory: Path) -> list[list[Any]]:
    """What tells whether an interrupted run had the same input."""
    files = [path for path in sorted(directory.resolve().iterdir()) if path.is_file()]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@contextmanager
def _unfinished(out: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` at the end; that of an interrupted run is taken up again."""
    if out.exists():
        raise UserError(f"{out} exists; remove it or give another --out")
    partial = out.with_name(f".{out.name}.partial")
    note, text = partial / _INPUTS, json.dumps(inputs)
    if not note.is_file() or note.read_text() != text:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_atomic(note, text)
    yield partial
    for name in (JOURNAL, _INPUTS):
        (partial / name).unlink(missing_ok=True)
    fsync(partial)
    replace_directory(partial, out)
