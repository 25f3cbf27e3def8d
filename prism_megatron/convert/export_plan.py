"""The plan of an export: whole modules in buckets, and the bytes that they take. Imports no torch.

``buckets.py`` carries it out.
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
    """Of a dtype all that a plan needs."""

    itemsize: int


@dataclass(frozen=True)
class Unit:
    """Parameters that make the same HF tensors; ``kind`` is how they are cut: expert, cut or whole."""

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
    """Whole modules of one pipeline stage that travel together."""

    stage: int
    units: list[Unit] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    @property
    def largest_module(self) -> tuple[int, str]:
        """Its bytes and name."""
        modules = groupby(self.units, key=lambda unit: unit.module)
        return max((sum(unit.bytes for unit in units), name) for name, units in modules)


def plan_buckets(table: Sequence[Rule], owners: Mapping[str, tuple[int, DType]], bucket_bytes: int) -> list[Bucket]:
    """The plan of an export: table order, cut where the stage changes or a bucket is full, never inside a module."""
    buckets: list[Bucket] = []
    full = 0
    for (stage, _), module in groupby(_owned_units(table, owners), key=lambda item: (item[0], item[1].module)):
        together = [unit for _, unit in module]
        size = sum(unit.bytes for unit in together)
        if not buckets or buckets[-1].stage != stage or full + size > bucket_bytes:
            buckets.append(Bucket(stage))
            full = 0
        buckets[-1].units += together
        full += size
    return buckets


def _owned_units(table: Sequence[Rule], owners: Mapping[str, tuple[int, DType]]) -> Iterator[tuple[int, Unit]]:
    for rules in units(table):
        stage, dtype = next(owners[rule.megatron] for rule in rules if rule.megatron in owners)
        kind = "expert" if rules[0].expert is not None else "cut" if rules[0].layout.axis is not None else "whole"
        yield stage, Unit(rules, kind, dtype)


def units(table: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Rules that make the same HF tensors: one, or all experts of a stack, which follow each other in the table."""
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
    """What an export holds at most beside the model, and the largest module, in bytes: a layer's experts are one.

    At a time there are two parts, one gathered ahead, and of the first a module put together. With the engine's copy of
    that module it is no more than two buckets (:func:`bucket_in_effect`). Pipeline stages cut parts where they end, and
    are not counted.
    """
    owners = {rule.megatron: (0, _Itemsize(itemsize)) for rule in table}
    buckets = plan_buckets(table, owners, bucket_bytes // 2)
    ahead = [*(bucket.bytes for bucket in buckets[1:]), 0]
    held = max(
        bucket.bytes + following + bucket.largest_module[0] for bucket, following in zip(buckets, ahead, strict=True)
    )
    return held, max(bucket.largest_module[0] for bucket in buckets)


def bucket_in_effect(bucket_bytes: int, largest_module: int) -> int:
    """The bucket that is asked for, or the least that has a half for every module: engines take these only whole."""
    return max(bucket_bytes, 2 * largest_module)
