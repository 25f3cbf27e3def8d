"""Gathering of an export's buckets (``export_plan.py``) over the ranks that have shards of their parameters."""

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
    """The ranks that parameters of a kind are gathered over.

    Attributes:
        group: process group, or None if the parameters are not gathered.
        shards: for each member, its (expert-parallel, tensor-parallel) rank: which experts and which shard it has.
    """

    group: Any
    shards: list[tuple[int, int]]


def route_of(kind: str) -> Route:
    """Return the route of parameters of a kind (:class:`Unit`). Collective."""
    if kind == "replicated":
        return Route(None, [(0, 0)])
    if kind == "sharded":
        group = parallel_state.get_tensor_model_parallel_group()
        shards = [(0, rank) for rank in range(group.size())]
    else:
        group = parallel_state.get_expert_tensor_and_model_parallel_group()
        shards = [(0, 0)] * group.size()
        local = (parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_tensor_parallel_rank())
        dist.all_gather_object(shards, local, group=group)
    return Route(group, shards)


def gather_bucket(
    bucket: Bucket, local: Mapping[str, Tensor], routes: Mapping[str, Route]
) -> list[tuple[Unit, list[list[Tensor]]]]:
    """Gather a bucket. Collective.

    Args:
        bucket: units to gather.
        local: this rank's shards by parameter name.
        routes: ranks to gather over, by kind of unit.

    Returns:
        (unit, the shards of each member of its group, in table order) for every unit.
    """
    by_kind: dict[tuple[str, torch.dtype], list[Unit]] = {}
    for unit in bucket.units:
        by_kind.setdefault((unit.kind, unit.dtype), []).append(unit)
    gathered: dict[int, list[list[Tensor]]] = {}
    for (kind, _), units in by_kind.items():
        for unit, shards in zip(units, _gather(units, bucket.stage, routes[kind], local), strict=True):
            gathered[id(unit)] = shards
    return [(unit, gathered[id(unit)]) for unit in bucket.units]


def _gather(
    units: Sequence[Unit], stage: int, route: Route, local: Mapping[str, Tensor]
) -> Iterator[list[list[Tensor]]]:
    """Yield, for every unit, the shards of each member of the group. Collective.

    All units have one kind and dtype. This rank's shards, in table order, are concatenated in one buffer, which is
    gathered over the group and then broadcast from the pipeline stage that has the parameters.
    """
    tensor_size = 1 + max(tensor_rank for _, tensor_rank in route.shards)
    expert_size = 1 + max(expert_rank for expert_rank, _ in route.shards)
    counts = [len(unit.rules) // expert_size for unit in units]
    names = [rule.megatron for unit in units for rule in unit.rules if rule.megatron in local]
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if len(route.shards) == pipeline.size() == 1:
        of_members = [[local[name] for name in names]]
    else:
        shapes = [
            unit.rules[0].shard_shape(tensor_size)
            for unit, count in zip(units, counts, strict=True)
            for _ in range(count)
        ]
        lengths = [prod(shape) for shape in shapes]
        if stage != pipeline.rank():
            buffer = torch.empty(len(route.shards), sum(lengths), dtype=units[0].dtype, device=groups.device())
        else:
            buffer = _gather_flat([local[name] for name in names], route)
        if pipeline.size() > 1:
            dist.broadcast(buffer, src=dist.get_global_rank(pipeline, stage), group=pipeline)
        of_members = [
            [flat.view(shape) for flat, shape in zip(row.split(lengths), shapes, strict=True)] for row in buffer
        ]
    start = 0
    for count in counts:
        yield [shards[start : start + count] for shards in of_members]
        start += count


def _gather_flat(local: Sequence[Tensor], route: Route) -> Tensor:
    """Concatenate tensors and gather them over the group: [members, n]. Collective."""
    buffer = local[0].new_empty(len(route.shards), sum(part.numel() for part in local))
    row = buffer[0 if route.group is None else route.group.rank()]
    torch.cat([part.flatten() for part in local], out=row)
    if len(route.shards) > 1:
        dist.all_gather_into_tensor(buffer.view(-1), row, group=route.group)
    return buffer
