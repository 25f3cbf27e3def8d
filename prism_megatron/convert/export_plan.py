"""The plan of an export: complete modules in buckets, and the memory that they take. Imports no torch.

``buckets.py`` gathers them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from prism_megatron.convert.rules import Rule

BUCKET_BYTES = 256 << 20
DType = Any  # a torch.dtype, or _Itemsize


class _Itemsize(NamedTuple):
    """The part of a dtype that a plan needs."""

    itemsize: int


@dataclass(frozen=True)
class Unit:
    """Parameters that make the same HF tensors: one, or all experts of a stack.

    ``kind``: expert, sharded (over tensor-parallel ranks) or replicated.
    """

    rules: list[Rule]
    kind: str
    dtype: DType

    @property
    def module(self) -> str:
        return self.rules[0].hf[0].rpartition(".")[0]

    @property
    def bytes(self) -> int:
        itemsize: int = self.dtype.itemsize
        return sum(rule.numel for rule in self.rules) * itemsize


@dataclass
class Bucket:
    """Complete modules of one pipeline stage that are gathered together."""

    stage: int
    units: list[Unit] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    @property
    def largest_module(self) -> tuple[int, str]:
        """Return the bytes and name of the largest module."""
        modules = groupby(self.units, key=lambda unit: unit.module)
        return max((sum(unit.bytes for unit in units), name) for name, units in modules)


def plan_buckets(
    table: Sequence[Rule], stage_and_dtype: Mapping[str, tuple[int, DType]], bucket_bytes: int
) -> list[Bucket]:
    """Split the parameters, in table order, into buckets of one pipeline stage each.

    A bucket is at most ``bucket_bytes``, or a single larger module; no module is in two buckets.
    ``stage_and_dtype`` gives the pipeline stage and dtype of every parameter by name.
    """
    buckets: list[Bucket] = []
    size = 0
    for (stage, _), module in groupby(_units(table, stage_and_dtype), key=lambda item: (item[0], item[1].module)):
        members = [unit for _, unit in module]
        module_bytes = sum(unit.bytes for unit in members)
        if not buckets or buckets[-1].stage != stage or size + module_bytes > bucket_bytes:
            buckets.append(Bucket(stage))
            size = 0
        buckets[-1].units += members
        size += module_bytes
    return buckets


def _units(table: Sequence[Rule], stage_and_dtype: Mapping[str, tuple[int, DType]]) -> Iterator[tuple[int, Unit]]:
    """Yield (pipeline stage, unit) in table order."""
    for rules in units(table):
        stage, dtype = next(stage_and_dtype[rule.megatron] for rule in rules if rule.megatron in stage_and_dtype)
        kind = "expert" if rules[0].expert is not None else "replicated" if rules[0].layout.axis is None else "sharded"
        yield stage, Unit(rules, kind, dtype)


def units(table: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Yield the rules that make the same HF tensors: one, or those of all experts of a stack, which are consecutive."""
    unit: list[Rule] = []
    for rule in table:
        if rule.tied:
            continue
        if unit and rule.hf != unit[0].hf:
            yield unit
            unit = []
        unit.append(rule)
    yield unit


def export_bytes(table: Sequence[Rule], itemsize: int, bucket_bytes: int = BUCKET_BYTES) -> tuple[int, int]:
    """Return the peak memory of an export in addition to the model, and the largest module, in bytes.

    All experts of a layer count as one module. The peak consists of two buckets, one of which is gathered in advance,
    and a module assembled from the other one. With the engine's copy of that module it is at most two buckets in effect
    (:func:`bucket_in_effect`). Buckets that end with a pipeline stage are not taken into account.
    """
    stage_and_dtype = {rule.megatron: (0, _Itemsize(itemsize)) for rule in table}
    buckets = plan_buckets(table, stage_and_dtype, bucket_bytes // 2)
    next_bytes = [*(bucket.bytes for bucket in buckets[1:]), 0]
    peak = max(
        bucket.bytes + following + bucket.largest_module[0]
        for bucket, following in zip(buckets, next_bytes, strict=True)
    )
    return peak, max(bucket.largest_module[0] for bucket in buckets)


def bucket_in_effect(bucket_bytes: int, largest_module: int) -> int:
    """Return the requested size, or the least one whose halves hold every module: engines need complete modules."""
    return max(bucket_bytes, 2 * largest_module)
