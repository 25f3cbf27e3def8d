"""How weights get from the rank that owns an engine to the engine's processes: three ways behind one interface.

Memory of a fixed size has two halves: one is filled while the other is read. The processes share it on the host, or
each end has its own and a process group brings each half over, or the processes open the owner's on a GPU.

Run on CPU: shared memory, and a process group of gloo. NCCL and memory of a GPU are not verified.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.errors import UserError
from prism_megatron.parallel import groups
from prism_megatron.upstream.torch_internals import reduce_tensor, unregistered_group

_TIMEOUT = timedelta(minutes=5)  # for a half to arrive where all wait for it, and for a group to form
_HOST = "127.0.0.1"

type Invitation = Callable[[], Transport]


class Piece(NamedTuple):
    """Bytes ``start`` to ``start + length`` of a tensor, which may be in several halves one after another."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    length: int


class Disconnected(RuntimeError):
    """The other ends are not all there, or did not take part in time."""


class Transport:
    """One end, the owner's or that of a process of the engine."""

    descriptors: tuple[int, ...] = ()  # files that the processes must inherit

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        """``memory`` is bytes; received tensors are on ``device``."""
        self._halves, self._device = memory.chunk(2), device

    def invitations(self, processes: int) -> list[Invitation]:
        """For each process of a new engine how it makes its end, there."""
        raise NotImplementedError

    def connect(self) -> None:
        """Wait until every process has made its end. Raises Disconnected."""

    def send(self, named: Iterable[tuple[str, Tensor]], announce: Callable[[list[Piece]], None]) -> None:
        """Bring tensors over. ``announce`` tells all processes what a half holds, and returns when they wait for it.

        Raises Disconnected.
        """
        for content, pieces in self._filled(named):
            announce(pieces)
            self._move(content)

    def receive(self, announced: Iterable[list[Piece]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors again, copied out. A half has been read when the next of ``announced`` is asked for."""
        for half, pieces in zip(cycle(self._halves), announced, strict=False):
            self._move(half[: sum(piece.length for piece in pieces)])
            used = 0
            for piece in pieces:
                if not piece.start:
                    tensor = torch.empty(piece.shape, dtype=piece.dtype, device=self._device)
                    content = _bytes_of(tensor)
                content[piece.start : piece.start + piece.length] = half[used : used + piece.length]
                used += piece.length
                if piece.start + piece.length == len(content):
                    yield piece.name, tensor
            _finish(half)

    def _filled(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Tensor, list[Piece]]]:
        """Copy tensors in, and yield the bytes of each half that are filled, and what they are."""
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
                    _finish(half)
                    yield half, pieces
                    half, pieces, used = next(halves), [], 0
                if start == len(content):
                    break
        if pieces:
            _finish(half)
            yield half[:used], pieces

    def _move(self, content: Tensor) -> None:
        """Have what the owner has in ``content`` in it at every end. Nothing to do where that is the same memory."""


class SharedMemory(Transport):
    """Anonymous memory of the host, known by its file descriptor: no name is left to clean up by a killed process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptors = (descriptor,)
        super().__init__(torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8), torch.device("cpu"))

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        descriptor = os.memfd_create("prism_weights")
        os.ftruncate(descriptor, size)
        return cls(descriptor)

    def invitations(self, processes: int) -> list[Invitation]:
        return [partial(SharedMemory, *self.descriptors)] * processes


class Collective(Transport):
    """A process group of the owner, rank 0, and its processes, beside the worlds that both are in: gloo, or NCCL."""

    def __init__(self, size: int, timeout: timedelta = _TIMEOUT) -> None:
        super().__init__(torch.empty(size, dtype=torch.uint8, device=groups.device()), groups.device())
        self._size, self._timeout = size, timeout
        self._place: tuple[dist.Store, int, int] | None = None
        self._group: Any = None

    def invitations(self, processes: int) -> list[Invitation]:
        store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._group, self._place = None, (store, 0, processes + 1)
        return [
            partial(Collective.joined, self._size, self._timeout, store.port, rank, processes + 1)
            for rank in range(1, processes + 1)
        ]

    @classmethod
    def joined(cls, size: int, timeout: timedelta, port: int, rank: int, ranks: int) -> Collective:
        """The end of a process of the engine. Raises Disconnected."""
        end = cls(size, timeout)
        end._place = dist.TCPStore(_HOST, port, is_master=False, timeout=timeout), rank, ranks
        end.connect()
        return end

    def connect(self) -> None:
        assert self._place is not None
        try:
            self._group = unregistered_group(*self._place, self._timeout)
        except RuntimeError as error:
            raise Disconnected(f"no process group formed within {self._timeout}: {error}") from error

    def _move(self, content: Tensor) -> None:
        try:
            self._group.broadcast([content], dist.BroadcastOptions()).wait(self._timeout)
        except RuntimeError as error:
            raise Disconnected(f"weights did not arrive: {error}") from error


class CudaIpc(Transport):
    """Memory of the owner's GPU, which processes on the same host open."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__(memory, groups.device())
        self._memory = memory

    def invitations(self, processes: int) -> list[Invitation]:
        return [partial(_opened, *reduce_tensor(self._memory)) for _ in range(processes)]


def check_transport(kind: str) -> None:
    """Refuse what this machine does not have. Raises UserError."""
    if kind == "cuda_ipc" and not torch.cuda.is_available():
        raise UserError("rollout.transport=cuda_ipc needs CUDA, which is not available; use shared_memory or auto")


def create_transport(kind: str, size: int) -> Transport:
    """The owner's end, with memory of ``size`` bytes, at least 2, rounded down to an even number."""
    check_transport(kind)
    even = size // 2 * 2
    if kind == "collective":
        return Collective(even)
    if kind == "cuda_ipc":
        return CudaIpc(torch.empty(even, dtype=torch.uint8, device=groups.device()))
    return SharedMemory.create(even)


def _opened(rebuild: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Transport:
    return CudaIpc(rebuild(*arguments))


def _finish(half: Tensor) -> None:
    """Wait for copies to and from ``half`` that a GPU may still be at."""
    if half.is_cuda:
        torch.cuda.synchronize(half.device)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
