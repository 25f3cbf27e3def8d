"""Memory that the ranks of a group share where all are on one host: gathering is then each rank's one copy into it.

A process group of CPU ranks goes through a socket instead, which takes several times as long as copying the bytes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.parallel import groups


class HostMemory:
    """The ranks of ``group``, which see each other's open files. All calls are collective over it."""

    def __init__(self, group: Any, owner: int, files: str) -> None:
        """``owner`` is the rank that makes the memory, ``files`` where the others find what it has open."""
        self._group, self._owner, self._files = group, owner, files

    @classmethod
    def create(cls, group: Any) -> HostMemory | None:
        """None on a GPU, or where ranks are on several hosts or behind several containers' walls."""
        if groups.device().type != "cpu":
            return None
        owner, token = dist.get_global_rank(group, 0), os.urandom(16)
        probe = os.memfd_create("prism_probe")
        os.write(probe, token)
        told = [(f"/proc/{os.getpid()}/fd", probe, token)]
        dist.broadcast_object_list(told, src=owner, group=group)
        files, descriptor, token = told[0]
        seen = [False] * group.size()
        dist.all_gather_object(seen, _holds(f"{files}/{descriptor}", token), group=group)
        os.close(probe)
        return cls(group, owner, files) if all(seen) else None

    def gather(self, own: Sequence[Tensor]) -> Tensor:
        """What every rank of the group has, end to end, [ranks, n]: ``own`` are as many numbers, n, of one dtype."""
        ranks, row = self._group.size(), sum(part.nbytes for part in own)
        descriptor = torch.zeros(1, dtype=torch.long)
        if dist.get_rank() == self._owner:
            descriptor[0] = os.memfd_create("prism_gathered")
            os.ftruncate(int(descriptor), ranks * row)
        dist.broadcast(descriptor, src=self._owner, group=self._group)
        mapped = os.open(f"{self._files}/{int(descriptor)}", os.O_RDWR)
        try:
            memory = torch.frombuffer(mmap.mmap(mapped, 0), dtype=own[0].dtype).view(ranks, -1)
        finally:
            os.close(mapped)
        torch.cat([part.flatten() for part in own], out=memory[self._group.rank()])
        dist.barrier(self._group)  # every rank has opened it, and written
        if dist.get_rank() == self._owner:
            os.close(int(descriptor))
        return memory


def _holds(path: str, token: bytes) -> bool:
    """Is this the owner's file? Elsewhere there is none, or one of another process of the same number."""
    try:
        found = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # which may be another process's pipe
    except OSError:
        return False
    try:
        return os.pread(found, len(token), 0) == token
    except OSError:
        return False
    finally:
        os.close(found)
