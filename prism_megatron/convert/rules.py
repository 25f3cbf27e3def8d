"""Rules that convert HF tensors to a Megatron parameter and back, and shard them over tensor-parallel ranks.

A layout has two inverse functions, ``join`` and ``split``, and the axis along which each HF tensor is sharded. Both
functions work on full tensors and on one rank's parts, so a rank reads only its part of each HF tensor. Functions that
compute import torch when they are called, since estimates use the tables without it (``recipes/estimate/memory.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# HF names with rules of their own.
EMBEDDING = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
SCORE_HEAD = "v_head.1.weight"
PARTS = ("policy", "discriminator")  # models in a training checkpoint, and prefixes of its keys


class Sliceable(Protocol):
    """A tensor, or a stored tensor that is read by indexing with integers and plain slices."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """Conversion and sharding of a parameter.

    Attributes:
        join: HF tensors, or one rank's parts of them, to the Megatron parameter or its shard.
        split: inverse of ``join``.
        axis: HF tensors are sharded along it; None if they are replicated.
        sections: equal blocks along ``axis`` that are each sharded.
        megatron_axis: the Megatron parameter is sharded along it.
        megatron_sections: equal blocks along ``megatron_axis`` that are each sharded.
        rows: length of the first axis, if ranks need not divide it: all parts have the length of the first, and the
            last is padded with zeros.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    axis: int | None
    sections: int = 1
    megatron_axis: int = 0
    megatron_sections: int = 1
    rows: int | None = None

    def cut(self, tensor: Sliceable, rank: int, size: int) -> Tensor:
        """Return a rank's part of one HF tensor, reading only that part."""
        if self.axis is None or size == 1:
            return tensor[:]
        section = tensor.shape[self.axis] // self.sections
        part = -(-section // size)
        starts = [s * section + rank * part for s in range(self.sections)]
        leading = (slice(None),) * self.axis
        pieces = [tensor[(*leading, slice(start, start + part))] for start in starts]
        if self.rows is not None:
            missing = part - len(pieces[0])
            return _cat((pieces[0], pieces[0].new_zeros(missing, *pieces[0].shape[1:])), 0)
        return _cat(pieces, self.axis) if len(pieces) > 1 else pieces[0]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate all ranks' parts of an HF tensor, in rank order."""
        if self.axis is None or len(parts) == 1:
            return parts[0]
        sections = zip(*(part.chunk(self.sections, self.axis) for part in parts), strict=True)
        return self.trimmed(_cat([piece for section in sections for piece in section], self.axis))

    def trimmed(self, parameter: Tensor) -> Tensor:
        """Return a full parameter without padding rows."""
        return parameter if self.rows is None else parameter[: self.rows]

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Return the HF tensors of a parameter, given its shards in rank order."""
        return [self.merge(parts) for parts in zip(*(self.split(shard) for shard in shards), strict=True)]

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        """Return a rank's shard of a full Megatron parameter."""
        return self.join([self.cut(tensor, rank, size) for tensor in self.split(parameter)])


@dataclass(frozen=True)
class Rule:
    """A Megatron parameter and the HF tensors that it consists of.

    Attributes:
        megatron: global name of the parameter.
        hf: names of the HF tensors.
        shapes: full shapes of the HF tensors.
        layout: conversion and sharding.
        expert: number of the expert, if the HF tensors stack all experts along their first axis.
        tied: the parameter repeats another's tensors; it is loaded and not exported.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    expert: int | None = None
    tied: bool = False

    def sources(self, tensors: Sequence[Sliceable]) -> list[Sliceable]:
        """Return the part of each HF tensor that this parameter consists of: all of it, or one expert's matrix."""
        return list(tensors) if self.expert is None else [OfStack(tensor, self.expert) for tensor in tensors]

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of a shard of ``size`` ranks."""
        import torch

        full = self.sources([torch.empty(shape, device="meta") for shape in self.shapes])
        return tuple(self.layout.join([self.layout.cut(tensor, 0, size) for tensor in full]).shape)

    @property
    def numel(self) -> int:
        total = sum(prod(shape) for shape in self.shapes)
        return total if self.expert is None else total // self.shapes[0][0]


@dataclass(frozen=True)
class OfStack:
    """One expert's matrix in a stacked tensor; indexing reads only that matrix."""

    stack: Sliceable
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stack.shape[1:])

    def __getitem__(self, index: Any) -> Tensor:
        return self.stack[(self.index, *index) if isinstance(index, tuple) else (self.index, index)]


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    import torch

    return torch.cat(list(tensors), axis)


def _first(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _transpose(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].T


def _transposed(tensor: Tensor) -> list[Tensor]:
    return [tensor.T]


REPLICATED = Layout(_first, _alone, axis=None)
ROWS = Layout(_first, _alone, axis=0)
COLUMNS = Layout(_first, _alone, axis=1, megatron_axis=1)


def padded_rows(rows: int) -> Layout:
    """Layout of a vocabulary's matrix, sharded by rows over any number of ranks."""
    return Layout(_first, _alone, axis=0, rows=rows)


# SwiGLU's first linear: gate and up, each sharded.
GATED = Layout(lambda ts: _cat(ts, 0), lambda t: list(t.chunk(2)), axis=0, megatron_sections=2)
# One expert of HF's stacks, which are stored input-first: [H, gate | up] and [I, H].
EXPERT_UP = Layout(_transpose, _transposed, axis=1, sections=2, megatron_sections=2)
EXPERT_DOWN = Layout(_transpose, _transposed, axis=0, megatron_axis=1)


def flattened(shape: tuple[int, ...]) -> Layout:
    """Layout of a convolution whose stride is its kernel, as a linear map of flattened patches; ``shape`` is HF's."""
    return Layout(lambda ts: ts[0].flatten(1), lambda t: [t.view(shape)], axis=None)


def grouped_qkv(heads_per_group: int, head_dim: int) -> Layout:
    """Layout of the q, k and v linears, stored by query group: the group's queries, its key, its value."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        rows = (heads_per_group * head_dim, head_dim, head_dim)
        parts = [t.reshape(-1, row, *t.shape[1:]) for t, row in zip(tensors, rows, strict=True)]
        return _cat(parts, 1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        groups = tensor.reshape(-1, heads_per_group + 2, head_dim, *tensor.shape[1:])
        return [part.flatten(0, 2) for part in groups.split((heads_per_group, 1, 1), dim=1)]

    return Layout(join, split, axis=0)


def headwise_qkv(head_dim: int) -> Layout:
    """Layout of HF's single vision linear [q of all heads; k; v], stored by head: its q, k, v."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)

    def split(tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)]

    return Layout(join, split, axis=0, sections=3)
