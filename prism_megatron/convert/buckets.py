"""The buckets of an export (``export_plan.py``), gathered over the ranks that have parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from prism_megatron.convert.export_plan import Bucket, Unit
from prism_megatron.parallel import groups


@dataclass(frozen=True)
class Route:
    """Who has parameters of a kind: for every member of ``group`` its part of the experts and of each matrix."""

    group: Any
    places: list[tuple[int, int]]


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
    return Route(group, places)


def gather_bucket(
    bucket: Bucket, here: Mapping[str, Tensor], routes: Mapping[str, Route]
) -> list[tuple[Unit, list[list[Tensor]]]]:
    """Every unit of the bucket in turn and, of every member of its group, its shards. Collective."""
    alike: dict[tuple[str, torch.dtype], list[Unit]] = {}
    for unit in bucket.units:
        alike.setdefault((unit.kind, unit.dtype), []).append(unit)
    found: dict[int, list[list[Tensor]]] = {}
    for (kind, _), members in alike.items():
        for unit, shards in zip(members, _gather(members, bucket.stage, routes[kind], here), strict=True):
            found[id(unit)] = shards
    return [(unit, found[id(unit)]) for unit in bucket.units]


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
    buffer = own[0].new_empty(len(route.places), sum(part.numel() for part in own))
    mine = buffer[0 if route.group is None else route.group.rank()]
    torch.cat([part.flatten() for part in own], out=mine)
    if len(route.places) > 1:
        dist.all_gather_into_tensor(buffer.view(-1), mine, group=route.group)
    return buffer
