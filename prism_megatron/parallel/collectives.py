"""The few collectives the stages need, each over the data-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from prism_megatron.parallel import groups


def _data_parallel_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group()


def sum_over_data_parallel(*values: float) -> list[float]:
    """Sum of each value over the data-parallel ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=groups.device())
    dist.all_reduce(total, group=_data_parallel_group())
    return [float(v) for v in total]


def max_over_data_parallel(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=groups.device())
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=_data_parallel_group())
    return float(total)


def gather_over_data_parallel[Item](items: list[Item]) -> list[Item]:
    """Every rank's list, concatenated in rank order, on every rank."""
    if groups.data_parallel_size() == 1:
        return items
    parts: list[list[Item] | None] = [None] * groups.data_parallel_size()
    dist.all_gather_object(parts, items, group=_data_parallel_group())
    return [item for part in parts if part is not None for item in part]
