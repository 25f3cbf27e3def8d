"""Conversion of checkpoints between HF and Megatron, one tensor at a time, without a model or ranks.

Both directions verify every tensor's name, shape and values, write a manifest with checksums, continue after an
interruption, and rename the directory to its name when it is complete. Every file is hashed once: the output while it
is written. A converted Megatron directory contains the other files of the HF directory, so training starts from either.
"""

from __future__ import annotations

import hashlib
import json
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
from prism_megatron.convert.hf_io import HFWeights, StoredTensor, check_finite, copy_side_files
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
from prism_megatron.convert.safetensors_writer import DTYPE_NAMES, ShardWriter, TensorSpec
from prism_megatron.convert.torch_dist import TorchDistReader, TorchDistWriter, sharded_key, whole_shapes
from prism_megatron.convert.transfer import check_source, check_tied
from prism_megatron.errors import UserError
from prism_megatron.files import directory_written_atomically, write_atomic
from prism_megatron.model.sizes import HFSizes, read_sizes

_INPUTS = "inputs.json"  # inputs of a conversion that is not finished
_FORMAT = 2  # of its journal
Report = Callable[[int, int], object]  # called with converted bytes and all bytes


@dataclass(frozen=True)
class Converted:
    """A finished directory and its HF tensors."""

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
    """Write ``out`` as a distributed checkpoint that loads at any layout, without resharding at ``parallel``.

    Parameters are stored in the blocks of tensor-parallel ranks, and each pipeline stage begins a file. Layers and
    experts are separate blocks at any degree.

    Args:
        hf: HF checkpoint directory.
        out: directory to write; must not exist.
        parallel: layout whose shards are stored.
        file_bytes: size at which a file is ended.
        report: called after each tensor.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or not finite, or ``parallel`` does not fit the model.
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
        with _resumable(out, {"hf": _fingerprint(hf), "parallel": asdict(parallel)}) as partial:
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
    """Write ``out`` as an HF checkpoint.

    Args:
        megatron: converted directory, or one iteration of a training run.
        out: directory to write; must not exist.
        template: HF directory with config, tokenizer and processor; by default ``megatron``.
        part: policy or discriminator, if the checkpoint contains both.
        verify: HF directory that every tensor must equal bit by bit.
        shard_bytes: largest size of a file.
        report: called after each tensor.

    Raises:
        UserError: as in :func:`hf_to_megatron`, or a file does not have its checksum.
    """
    if fault := first_fault(megatron):
        raise UserError(f"{megatron}: {fault}; convert or save it again")
    template = template or megatron
    sizes = read_sizes(template)
    about = read_manifest(megatron)
    with TorchDistReader(megatron) as reader:
        stored = reader.tensors()
        prefix = f"{part or about.get('part') or _only_part(megatron, stored)}."
        table = _stored_table(sizes, stored, prefix)
        _check_stored(table, stored, prefix)
        swapped = bool(about.get("experts_swapped"))
        outputs = list(_outputs(table, _LastRead(reader, prefix), stored, swapped))
        if about.get("stores_tied_output"):
            outputs += [
                replace(output, spec=output.spec._replace(name=OUTPUT))
                for output in outputs
                if output.spec.name == EMBEDDING
            ]
        specs = [output.spec for output in outputs]
        inputs = {"megatron": _fingerprint(megatron), "template": _fingerprint(template), "shard_bytes": shard_bytes}
        with _resumable(out, inputs) as partial:
            writer = ShardWriter(partial, specs, shard_bytes)
            total = sum(spec.bytes for spec in specs)
            done = {entry.name for entry in writer.entries}
            count = sum(entry.bytes for entry in writer.entries)
            for output in outputs:
                if output.spec.name not in done:
                    count += writer.add(output.spec.name, output.parts()).bytes
                    report(count, total)
            files = writer.finish() | digest_files(partial, copy_side_files(template, partial, {}))
            _check_complete({spec.name for spec in specs}, writer.entries)
            _check_unchanged(about["tensors"], writer.entries)
            if verify is not None:
                verify_against(verify, writer.entries)
            write_manifest(partial, files, writer.entries)
    return Converted(out, writer.entries)


@dataclass(frozen=True)
class _Output:
    """An HF tensor to write; ``parts`` reads its values in consecutive parts."""

    spec: TensorSpec
    parts: Callable[[], Iterator[Tensor]]


@dataclass
class _LastRead:
    """Reader of parameters that caches the last one, which several HF tensors may consist of."""

    reader: TorchDistReader
    prefix: str
    name: str = ""
    parameter: Tensor | None = None

    def __call__(self, rule: Rule) -> Tensor:
        if self.parameter is None or self.name != rule.megatron:
            self.parameter = None  # frees its memory first
            self.parameter = rule.layout.trimmed(self.reader.read(sharded_key(rule), self.prefix))
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
        dtype = stored[read.prefix + sharded_key(unit[0]).key][1]
        for position, (name, shape) in enumerate(zip(unit[0].hf, unit[0].shapes, strict=True)):
            if unit[0].expert is not None and swapped:
                shape = (shape[0], shape[2], shape[1])

            def parts(unit: list[Rule] = unit, position: int = position) -> Iterator[Tensor]:
                for rule in unit:
                    tensor = rule.layout.split(read(rule))[position]
                    yield tensor.T if rule.expert is not None and swapped else tensor

            yield _Output(TensorSpec(name, shape, dtype), parts)


def _store(unit: list[Rule], weights: HFWeights, writer: TorchDistWriter) -> list[TensorEntry]:
    """Write the parameters of one unit; returns the entries of their HF tensors."""
    tensors = [weights.lazy(name) for name in unit[0].hf]
    digests = [hashlib.sha256() for _ in tensors]
    swapped = unit[0].expert is not None and weights.experts_swapped
    with ThreadPoolExecutor(len(tensors)) as hashing:
        for rule in unit:
            parts = [source[:] for source in rule.sources(tensors)]
            for part in parts:
                check_finite(", ".join(rule.hf), part)
            # Meanwhile the writer hashes the same values in Megatron's order, for the file's checksum.
            hashed = [hashing.submit(_hash, *pair, swapped) for pair in zip(digests, parts, strict=True)]
            writer.add(rule, rule.layout.join(parts))
            for one in hashed:
                one.result()
    return [
        _entry(name, tensor, swapped, digest.hexdigest())
        for name, tensor, digest in zip(unit[0].hf, tensors, digests, strict=True)
    ]


def _hash(digest: Any, tensor: Tensor, swapped: bool) -> None:
    """Update a digest with a tensor's values as they are stored."""
    digest.update((tensor.T if swapped else tensor).contiguous().flatten().view(torch.uint8).numpy())


def verify_against(hf: Path, entries: Sequence[TensorEntry]) -> None:
    """Raise UserError unless an HF directory contains exactly these tensors, bit by bit."""
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
    parts = [part for part in PARTS if any(key.startswith(f"{part}.") for key in stored)]
    if len(parts) != 1:
        raise UserError(f"{directory} holds {' and '.join(parts) or 'no model'}; say which with --part")
    return parts[0]


def _check_stored(table: Sequence[Rule], stored: dict[str, tuple[tuple[int, ...], torch.dtype]], prefix: str) -> None:
    expected = {prefix + key: shape for key, shape in whole_shapes(table).items()}
    padded = {prefix + sharded_key(rule).key for rule in table if rule.layout.rows is not None}
    found = {key: shape for key, (shape, _) in stored.items() if key.startswith(prefix)}
    _compare("the checkpoint", expected.keys(), found.keys())
    for key, shape in expected.items():
        fits = found[key] == shape or (key in padded and found[key][0] > shape[0] and found[key][1:] == shape[1:])
        if not fits:
            raise UserError(f"{key} has shape {found[key]}, not {shape}; config.json is of another model")


def _check_complete(names: set[str], entries: Sequence[TensorEntry]) -> None:
    _compare("the result", names, {entry.name for entry in entries})
    assert len(entries) == len(names), "a tensor was written twice"


def _compare(what: str, expected: Collection[str], found: Collection[str]) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{what} lacks {len(missing)} tensors of this model: {', '.join(missing[:3])}")
    if extra := sorted(set(found) - set(expected)):
        raise UserError(f"{what} has {len(extra)} tensors that this model does not have: {', '.join(extra[:3])}")


def _check_unchanged(before: Sequence[TensorEntry], after: Sequence[TensorEntry]) -> None:
    """Raise UserError if a tensor differs from the one that was converted; a training checkpoint lists none."""
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
    """Return the pipeline stage of a parameter, for the choice of its file."""
    if not rule.megatron.startswith("decoder.layers."):
        return parallel.pipeline_model_parallel_size - 1 if rule.megatron.startswith(("decoder.", "output_")) else 0
    per_stage = -(-sizes.text["num_hidden_layers"] // parallel.pipeline_model_parallel_size)
    return int(sharded_key(rule).lead[0] // per_stage)


def _fingerprint(directory: Path) -> list[list[Any]]:
    """Return paths, sizes and times of the input files, to recognise an interrupted conversion of the same input."""
    files = [path for path in sorted(directory.resolve().iterdir()) if path.is_file()]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


@contextmanager
def _resumable(out: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Yield a directory that becomes ``out`` at the end, resuming an interrupted conversion of the same inputs."""
    if out.exists():
        raise UserError(f"{out} exists; remove it or give another --out")
    text = json.dumps({"format": _FORMAT, **inputs})
    note = out.with_name(f".{out.name}.partial") / _INPUTS
    resume = note.is_file() and note.read_text() == text
    with directory_written_atomically(out, resume) as partial:
        if not resume:
            write_atomic(partial / _INPUTS, text)
        yield partial
        for name in (JOURNAL, _INPUTS):
            (partial / name).unlink()
