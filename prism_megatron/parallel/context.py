"""Context parallelism: the tokens of a packed batch on each rank, and collectives over the ranks of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def context_tokens(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Return the indices of a rank's tokens, [T / size] int64, in the rank's order.

    Every sequence is split into 2 x ``size`` equal chunks. A rank has the ``rank``-th chunk from the front and the
    ``rank``-th from the back, so that a causal mask gives all ranks the same work. Sequence lengths must be multiples
    of 2 x ``size``.
    """
    pieces = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunk, rest = divmod(end - start, 2 * size)
        assert rest == 0, f"a sequence of {end - start} tokens cannot be split into {2 * size} chunks"
        for number in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(pieces).to(cu_seqlens.device)


def sum_over(values: Tensor, group: Any) -> Tensor:
    """Sum ``values`` over ``group``; the gradient is passed through.

    For sums that every rank uses in the same way, so that every rank computes the whole gradient of the sum.
    """
    summed: Tensor = _Sum.apply(values, group)
    return summed


def gather_sequence(values: Tensor, group: Any) -> Tensor:
    """Concatenate [T', ...] of the ranks of ``group``; the gradient is summed over the ranks and scattered."""
    gathered: Tensor = _Gather.apply(values, group)
    return gathered


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = values.new_empty(group.size() * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(parts, values.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        local = gradient.new_empty(len(gradient) // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(local, gradient.contiguous(), group=ctx.group)
        return local, None
