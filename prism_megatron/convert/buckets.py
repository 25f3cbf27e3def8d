"""The buckets that an export travels in: whole modules, gathered over the ranks that have parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from prism_megatron.convert.rules import Rule
from prism_megatron.parallel import groups
from prism_megatron.parallel.host_memory import HostMemory


@dataclass(frozen=True)
class Unit:
    """Parameters that make the same HF tensors; ``kind`` is how they are cut: expert, cut or whole."""

    rules: list[Rule]
    kind: str
    dtype: torch.dtype

    @property
    def module(self) -> str:
        return self.rules[0].hf[0].rpartition(".")[0]

    @property
    def bytes(self) -> int:
        return sum(rule.numel for rule in self.rules) * self.dtype.itemsize


@dataclass(frozen=True)
class Route:
    """Who has parameters of a kind: for every member of ``group`` its part of the experts and of each matrix.

    ``memory`` is what the members share, if they can.
    """

    group: Any
    places: list[tuple[int, int]]
    memory: HostMemory | None = None


def route_of(kind: str) -> Route:
    """Collective."""
    if kind == "whole":
        return Route(None, [(0, 0)])
    if kind == "cut":
        group = parallel_state.get_tensor_model_parallel_group()
        places = [(0, rank) for rank in range(group.size())]
    else:
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        places = [(0, 0)] * group.size()
        mine = (parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank())
        dist.all_gather_object(places, mine, group=group)
    return Route(group, places, HostMemory.create(group) if len(places) > 1 else None)


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

    def gather(self, here: Mapping[str, Tensor], routes: Mapping[str, Route]) -> list[tuple[Unit, list[list[Tensor]]]]:
        """Every unit in turn and, of every member of its group, its shards. Collective."""
        alike: dict[tuple[str, torch.dtype], list[Unit]] = {}
        for unit in self.units:
            alike.setdefault((unit.kind, unit.dtype), []).append(unit)
        found: dict[int, list[list[Tensor]]] = {}
        for (kind, _), members in alike.items():
            for unit, shards in zip(members, _gather(members, self.stage, routes[kind], here), strict=True):
                found[id(unit)] = shards
        return [(unit, found[id(unit)]) for unit in self.units]


def plan_buckets(
    table: Sequence[Rule], owners: Mapping[str, tuple[int, torch.dtype]], bucket_bytes: int
) -> list[Bucket]:
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


def _owned_units(table: Sequence[Rule], owners: Mapping[str, tuple[int, torch.dtype]]) -> Iterator[tuple[int, Unit]]:
    for rules in units(table):
        stage, dtype = next(owners[rule.megatron] for rule in rules if rule.megatron in owners)
        kind = "expert" if rules[0].expert is not None else "cut" if rules[0].layout.axis is not None else "whole"
        yield stage, Unit(rules, kind, dtype)


def _gather(
    units: Sequence[Unit], stage: int, route: Route, here: Mapping[str, Tensor]
) -> Iterator[list[list[Tensor]]]:
    """Of every unit, all alike in kind and dtype, the shards of every member of the group. Collective.

    This rank's shards, in table order, go end to end into one buffer; then everybody's; then down the pipeline.
    """
    etp = 1 + max(place for _, place in route.places)
    present = 1 + max(part for part, _ in route.places)
    counts = [len(unit.rules) // present for unit in units]
    names = [rule.megatron for unit in units for rule in unit.rules if rule.megatron in here]
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if len(route.places) == pipeline.size() == 1:
        everybody = [[here[name] for name in names]]
    else:
        shapes = [
            unit.rules[0].shard_shape(etp) for unit, count in zip(units, counts, strict=True) for _ in range(count)
        ]
        lengths = [prod(shape) for shape in shapes]
        if stage != pipeline.rank():
            buffer = torch.empty(len(route.places), sum(lengths), dtype=units[0].dtype, device=groups.device())
        else:
            buffer = _over_members([here[name] for name in names], route)
        if pipeline.size() > 1:
            dist.broadcast(buffer, src=dist.get_global_rank(pipeline, stage), group=pipeline)
        everybody = [
            [flat.view(shape) for flat, shape in zip(row.split(lengths), shapes, strict=True)] for row in buffer
        ]
    start = 0
    for count in counts:
        yield [shards[start : start + count] for shards in everybody]
        start += count


def _over_members(own: Sequence[Tensor], route: Route) -> Tensor:
    """What every member of the group has, end to end: [members, n]. Collective."""
    if route.memory is not None:
        return route.memory.gather(own)
    buffer = own[0].new_empty(len(route.places), sum(part.numel() for part in own))
    mine = buffer[0 if route.group is None else route.group.rank()]
    torch.cat([part.flatten() for part in own], out=mine)
    if len(route.places) > 1:
        dist.all_gather_into_tensor(buffer.view(-1), mine, group=route.group)
    return buffer


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
