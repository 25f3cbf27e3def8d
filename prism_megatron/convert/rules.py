"""How HF tensors make one Megatron parameter, and how that parameter is cut over tensor-parallel ranks.

Four functions say it all: ``join`` HF tensors into the full parameter and ``split`` it back, ``shard`` the full
parameter for a rank and ``unshard`` all ranks' pieces. Each pair is an exact inverse, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    shard: Callable[[Tensor, int, int], Tensor]
    unshard: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (global name) and the HF tensors it is made of.

    ``expert`` is set when the HF tensor stacks all experts and this parameter is one of them.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    expert: int | None = None


def _first(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _whole(tensor: Tensor, rank: int, size: int) -> Tensor:
    return tensor


def _chunk(tensor: Tensor, rank: int, size: int, dim: int) -> Tensor:
    return tensor.chunk(size, dim)[rank]


def _chunk_each(tensor: Tensor, rank: int, size: int, parts: int) -> Tensor:
    return torch.cat([part.chunk(size)[rank] for part in tensor.chunk(parts)])


def _unchunk_each(shards: Sequence[Tensor], parts: int) -> Tensor:
    return torch.cat([torch.cat(pieces) for pieces in zip(*(shard.chunk(parts) for shard in shards), strict=True)])


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(tensors), dim)


REPLICATED = Layout(_first, _alone, _whole, _first)
ROWS = Layout(_first, _alone, partial(_chunk, dim=0), _cat)
COLUMNS = Layout(_first, _alone, partial(_chunk, dim=1), partial(_cat, dim=1))
# SwiGLU's first linear: [gate; up], each cut on its own.
GATED = Layout(_cat, lambda t: list(t.chunk(2)), partial(_chunk_each, parts=2), partial(_unchunk_each, parts=2))


def flattened(shape: tuple[int, ...]) -> Layout:
    """A convolution kernel that covers its stride: a linear map of flattened patches. ``shape`` is HF's."""
    return Layout(lambda ts: ts[0].flatten(1), lambda t: [t.view(shape)], _whole, _first)


def grouped_qkv(num_heads: int, num_groups: int, head_dim: int) -> Layout:
    """q, k, v of separate HF linears, laid out group by group (the group's queries, its key, its value)."""
    per_group = num_heads // num_groups

    def join(tensors: Sequence[Tensor]) -> Tensor:
        q, k, v = (t.view(num_groups, -1, head_dim, *t.shape[1:]) for t in tensors)
        return torch.cat((q, k, v), dim=1).flatten(0, 2)

    def split(tensor: Tensor) -> list[Tensor]:
        groups = tensor.view(num_groups, per_group + 2, head_dim, *tensor.shape[1:])
        return [part.flatten(0, 2) for part in groups.split((per_group, 1, 1), dim=1)]

    return Layout(join, split, partial(_chunk, dim=0), _cat)


def headwise_qkv(num_heads: int) -> Layout:
    """HF's one vision linear [q of all heads; k; v], laid out head by head (its q, k, v)."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)

    def split(tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)]

    return Layout(join, split, partial(_chunk, dim=0), _cat)


def expert_up(index: int) -> Layout:
    """Expert ``index`` of the stacked [E, H, 2I] tensor (columns gate | up), as a [2I, H] linear."""
    return Layout(lambda ts: ts[0][index].T, lambda t: [t.T], GATED.shard, GATED.unshard)


def expert_down(index: int) -> Layout:
    """Expert ``index`` of the stacked [E, I, H] tensor, as an [H, I] linear."""
    return Layout(lambda ts: ts[0][index].T, lambda t: [t.T], COLUMNS.shard, COLUMNS.unshard)
