"""Tensors through shared memory of a fixed size: one half of it is filled while the other is read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Bytes ``start`` to ``start + length`` of a tensor, which may be in several halves one after another."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    length: int


class SharedHalves:
    """Anonymous memory, known by its file descriptor: it has no name to clean up after a killed process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._halves = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8).chunk(2)

    @classmethod
    def create(cls, size: int) -> SharedHalves:
        """Of ``size`` bytes, at least 2, rounded down to an even number."""
        descriptor = os.memfd_create("prism_weights")
        os.ftruncate(descriptor, size // 2 * 2)
        return cls(descriptor)

    def fill(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[list[Piece]]:
        """Copy tensors in, and yield what each half holds, in turn: go on when the other one has been read."""
        halves = cycle(self._halves)
        half, pieces, used = next(halves), list[Piece](), 0
        for name, tensor in named:
            content, start = _bytes_of(tensor.detach()), 0
            while True:
                length = min(len(half) - used, len(content) - start)
                half[used : used + length] = content[start : start + length]
                pieces.append(Piece(name, tuple(tensor.shape), tensor.dtype, start, length))
                start, used = start + length, used + length
                if used == len(half):
                    yield pieces
                    half, pieces, used = next(halves), [], 0
                if start == len(content):
                    break
        if pieces:
            yield pieces

    def read(self, filled: Iterable[list[Piece]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors again, copied out. A half has been read when the next of ``filled`` is asked for."""
        for half, pieces in zip(cycle(self._halves), filled, strict=False):
            used = 0
            for piece in pieces:
                if not piece.start:
                    tensor = torch.empty(piece.shape, dtype=piece.dtype)
                    content = _bytes_of(tensor)
                content[piece.start : piece.start + piece.length] = half[used : used + piece.length]
                used += piece.length
                if piece.start + piece.length == len(content):
                    yield piece.name, tensor


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
