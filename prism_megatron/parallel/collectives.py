"""Collectives over the data-parallel group, over the pipeline stages and over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from prism_megatron.errors import SharedError, UserError
from prism_megatron.parallel import groups


def _data_parallel_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def sum_over_data_parallel(*values: float) -> list[float]:
    """Sum each value over the data-parallel ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=groups.device())
    dist.all_reduce(total, group=_data_parallel_group())
    return [float(v) for v in total]


def max_over_data_parallel(value: float) -> float:
    """Return the largest value of the data-parallel ranks."""
    total = torch.tensor(value, dtype=torch.float64, device=groups.device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=_data_parallel_group())
    return float(total)


def max_over_ranks(value: float) -> float:
    """Return the largest value of all ranks."""
    total = torch.tensor(value, dtype=torch.float64, device=groups.device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return float(total)


def gather_over_data_parallel[Item](items: list[Item]) -> list[Item]:
    """Concatenate the lists of the data-parallel ranks, in rank order, on every rank."""
    if groups.data_parallel_size() == 1:
        return items
    parts: list[list[Item] | None] = [None] * groups.data_parallel_size()
    dist.all_gather_object(parts, items, group=_data_parallel_group())
    return [item for part in parts if part is not None for item in part]


def gather_over_ranks[Item](item: Item) -> list[Item]:
    """Return every rank's item, in rank order, on every rank."""
    items = [item] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def on_main_rank[Result](action: Callable[[], Result]) -> Result | None:
    """Run ``action`` on the main rank and return its result there, None on the others. Collective.

    Raises SharedError on all ranks if it raised UserError.
    """
    result, refusal = None, [""]
    if groups.is_main_rank():
        try:
            result = action()
        except UserError as error:
            refusal = [str(error)]
    dist.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise SharedError(refusal[0])
    return result


def from_last_stage[Value](value: Value) -> Value:
    """Return the last pipeline stage's ``value`` on every stage."""
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


def sum_over_pipeline(*values: float) -> list[float]:
    """Sum each value over the pipeline stages, in float64."""
    from megatron.core import parallel_state

    total = torch.tensor(values, dtype=torch.float64, device=groups.device())
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return [float(v) for v in total]
