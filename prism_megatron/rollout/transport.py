"""Transports of weights from a rank to the subprocesses of its engine: shared memory, a process group, or CUDA IPC.

A buffer of fixed size has two halves: one is filled while the other is read. The subprocesses share it on the host, or
have buffers of their own that a process group broadcasts to, or open the rank's buffer on a GPU.

Verified on CPU: shared memory, and a gloo process group. NCCL and CUDA IPC are not verified.
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

_TIMEOUT = timedelta(minutes=5)  # for one buffer transfer, and for the creation of a process group
_HOST = "127.0.0.1"

type Invitation = Callable[[], Transport]


class Piece(NamedTuple):
    """Bytes ``start`` to ``start + length`` of a tensor, which several consecutive halves may hold."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    length: int


class Disconnected(RuntimeError):
    """A process is missing, or did not take part in time."""


class Transport:
    """One end of a transport, in the rank or in a subprocess of its engine."""

    descriptors: tuple[int, ...] = ()  # file descriptors that the subprocesses must inherit

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        """Use ``memory``, a tensor of bytes, as the buffer; received tensors are on ``device``."""
        self._halves, self._device = memory.chunk(2), device

    def invitations(self, processes: int) -> list[Invitation]:
        """Constructors of the other ends, one for each subprocess of a new engine to call."""
        raise NotImplementedError

    def connect(self) -> None:
        """Wait until every subprocess has constructed its end. Raises Disconnected."""

    def send(self, named: Iterable[tuple[str, Tensor]], announce: Callable[[list[Piece]], None]) -> None:
        """Send tensors. Raises Disconnected.

        ``announce`` sends the list of what a half holds to all subprocesses, and returns when they wait for the half.
        """
        for content, pieces in self._filled(named):
            announce(pieces)
            self._move(content)

    def receive(self, announced: Iterable[list[Piece]]) -> Iterator[tuple[str, Tensor]]:
        """Yield copies of the tensors. A half has been read when the next item of ``announced`` is requested."""
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
        """Copy tensors into the halves in turn; yields the filled bytes of each half and the list of what they are."""
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
        """Copy the rank's ``content`` to the same bytes of every end; by default they are the same memory."""


class SharedMemory(Transport):
    """Anonymous memory of the host behind a file descriptor: a killed process leaves no name to clean up."""

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
    """A separate process group, gloo or NCCL, of the training rank (its rank 0) and the subprocesses."""

    def __init__(self, size: int, timeout: timedelta = _TIMEOUT) -> None:
        super().__init__(torch.empty(size, dtype=torch.uint8, device=groups.device()), groups.device())
        self._size, self._timeout = size, timeout
        self._address: tuple[dist.Store, int, int] | None = None
        self._group: Any = None

    def invitations(self, processes: int) -> list[Invitation]:
        store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._group, self._address = None, (store, 0, processes + 1)
        return [
            partial(Collective.joined, self._size, self._timeout, store.port, rank, processes + 1)
            for rank in range(1, processes + 1)
        ]

    @classmethod
    def joined(cls, size: int, timeout: timedelta, port: int, rank: int, ranks: int) -> Collective:
        """Construct the end of a subprocess. Raises Disconnected."""
        end = cls(size, timeout)
        end._address = dist.TCPStore(_HOST, port, is_master=False, timeout=timeout), rank, ranks
        end.connect()
        return end

    def connect(self) -> None:
        assert self._address is not None
        try:
            self._group = unregistered_group(*self._address, self._timeout)
        except RuntimeError as error:
            raise Disconnected(f"no process group formed within {self._timeout}: {error}") from error

    def _move(self, content: Tensor) -> None:
        try:
            self._group.broadcast([content], dist.BroadcastOptions()).wait(self._timeout)
        except RuntimeError as error:
            raise Disconnected(f"weights did not arrive: {error}") from error


class CudaIpc(Transport):
    """Memory of the rank's GPU, which the subprocesses open."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__(memory, groups.device())
        self._memory = memory

    def invitations(self, processes: int) -> list[Invitation]:
        return [partial(_opened, *reduce_tensor(self._memory)) for _ in range(processes)]


def check_transport(kind: str) -> None:
    """Raise UserError for a transport that this machine cannot run."""
    if kind == "cuda_ipc" and not torch.cuda.is_available():
        raise UserError("rollout.transport=cuda_ipc needs CUDA, which is not available; use shared_memory or auto")


def create_transport(kind: str, size: int) -> Transport:
    """The rank's end, with a buffer of ``size`` bytes, at least 2, rounded down to an even number."""
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
    """Wait until a GPU has finished copies to and from ``half``."""
    if half.is_cuda:
        torch.cuda.synchronize(half.device)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
