"""How HF tensors make one Megatron parameter, and how they are cut over tensor-parallel ranks.

A layout is two exact inverses, ``join`` and ``split``, and the axis along which each HF tensor is cut. Both functions
work on whole tensors and on one rank's parts alike, so a rank reads its part of each HF tensor and nothing else.
Tables are counted without torch (``recipes/estimate/memory.py``), so only what computes imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# HF names that are more than a row of the table.
EMBEDDING = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
SCORE_HEAD = "v_head.1.weight"
PARTS = ("policy", "discriminator")  # what a training checkpoint holds, and the prefix of its keys


class Sliceable(Protocol):
    """A tensor, or something on disk that reads what is indexed (integers and plain slices)."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """``axis`` of the HF tensors is cut over ranks, each of its ``sections`` equal blocks alike; None: all have all.

    Where the Megatron parameter is one big matrix, rank r's shard is its r-th part along ``megatron_axis``, cut in
    ``megatron_sections`` likewise. With ``rows``, the first axis is that long and need not divide: all parts are as
    long as the first, and zeros fill up the last.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    axis: int | None
    sections: int = 1
    megatron_axis: int = 0
    megatron_sections: int = 1
    rows: int | None = None

    def cut(self, tensor: Sliceable, rank: int, size: int) -> Tensor:
        """This rank's part of one HF tensor, reading only that part."""
        if self.axis is None or size == 1:
            return tensor[:]
        section = tensor.shape[self.axis] // self.sections
        part = -(-section // size)
        starts = [s * section + rank * part for s in range(self.sections)]
        before = (slice(None),) * self.axis
        pieces = [tensor[(*before, slice(start, start + part))] for start in starts]
        if self.rows is not None:
            missing = part - len(pieces[0])
            return _cat((pieces[0], pieces[0].new_zeros(missing, *pieces[0].shape[1:])), 0)
        return _cat(pieces, self.axis) if len(pieces) > 1 else pieces[0]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The HF tensor of all ranks' parts, in rank order."""
        if self.axis is None or len(parts) == 1:
            return parts[0]
        sections = zip(*(part.chunk(self.sections, self.axis) for part in parts), strict=True)
        return self.trimmed(_cat([piece for section in sections for piece in section], self.axis))

    def trimmed(self, parameter: Tensor) -> Tensor:
        """A whole parameter without the rows that fill it up."""
        return parameter if self.rows is None else parameter[: self.rows]

    def to_hf(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """HF tensors of one parameter's shards, in rank order."""
        return [self.merge(parts) for parts in zip(*(self.split(shard) for shard in shards), strict=True)]

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        """A rank's shard of a whole Megatron parameter."""
        return self.join([self.cut(tensor, rank, size) for tensor in self.split(parameter)])


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter (global name) and the HF tensors, of these whole shapes, that it is made of.

    expert  set when the HF tensors stack all experts along their first axis and this parameter is one of them
    tied    the parameter repeats another's tensors: filled like any, never exported
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    expert: int | None = None
    tied: bool = False

    def sources(self, tensors: Sequence[Sliceable]) -> list[Sliceable]:
        """The part of each HF tensor that this parameter is made of: all of it, or one expert's matrix."""
        return list(tensors) if self.expert is None else [OfStack(tensor, self.expert) for tensor in tensors]

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Shape of one of ``size`` ranks' shards."""
        import torch

        whole = self.sources([torch.empty(shape, device="meta") for shape in self.shapes])
        return tuple(self.layout.join([self.layout.cut(tensor, 0, size) for tensor in whole]).shape)

    @property
    def numel(self) -> int:
        total = sum(prod(shape) for shape in self.shapes)
        return total if self.expert is None else total // self.shapes[0][0]


@dataclass(frozen=True)
class OfStack:
    """One expert's matrix of a stacked tensor, read on its own."""

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
    """A vocabulary's matrix, cut by rows over any number of ranks."""
    return Layout(_first, _alone, axis=0, rows=rows)


# SwiGLU's first linear: gate over up, each cut on its own.
GATED = Layout(lambda ts: _cat(ts, 0), lambda t: list(t.chunk(2)), axis=0, megatron_sections=2)
# One expert of HF's stacks, which are stored input-first: [H, gate | up] and [I, H].
EXPERT_UP = Layout(_transpose, _transposed, axis=1, sections=2, megatron_sections=2)
EXPERT_DOWN = Layout(_transpose, _transposed, axis=0, megatron_axis=1)


def flattened(shape: tuple[int, ...]) -> Layout:
    """A convolution kernel that covers its stride: a linear map of flattened patches. ``shape`` is HF's."""
    return Layout(lambda ts: ts[0].flatten(1), lambda t: [t.view(shape)], axis=None)


def grouped_qkv(heads_per_group: int, head_dim: int) -> Layout:
    """q, k, v of separate HF linears, laid out group by group (the group's queries, its key, its value)."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        rows = (heads_per_group * head_dim, head_dim, head_dim)
        parts = [t.reshape(-1, row, *t.shape[1:]) for t, row in zip(tensors, rows, strict=True)]
        return _cat(parts, 1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        groups = tensor.reshape(-1, heads_per_group + 2, head_dim, *tensor.shape[1:])
        return [part.flatten(0, 2) for part in groups.split((heads_per_group, 1, 1), dim=1)]

    return Layout(join, split, axis=0)


def headwise_qkv(head_dim: int) -> Layout:
    """HF's one vision linear [q of all heads; k; v], laid out head by head (its q, k, v)."""

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)

    def split(tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)]

    return Layout(join, split, axis=0, sections=3)
