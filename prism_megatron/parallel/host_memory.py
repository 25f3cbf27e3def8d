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
        owner = dist.get_global_rank(group, 0)
        with open(os.devnull, "rb") as probe:
            place = [(os.uname().nodename, f"/proc/{os.getpid()}/fd", probe.fileno())]
            dist.broadcast_object_list(place, src=owner, group=group)
            host, files, descriptor = place[0]
            seen = [False] * group.size()
            mine = host == os.uname().nodename and os.access(f"{files}/{descriptor}", os.R_OK)
            dist.all_gather_object(seen, mine, group=group)
        return cls(group, owner, files) if all(seen) else None

    def gather(self, own: Sequence[Tensor]) -> Tensor:
        """What every rank of the group has, end to end, [ranks, n]: ``own`` are as many numbers, n, of one dtype."""
        ranks, row = self._group.size(), sum(part.nbytes for part in own)
        described = torch.zeros(1, dtype=torch.long)
        if dist.get_rank() == self._owner:
            described[0] = os.memfd_create("prism_gathered")
            os.ftruncate(int(described), ranks * row)
        dist.broadcast(described, src=self._owner, group=self._group)
        mapped = os.open(f"{self._files}/{int(described)}", os.O_RDWR)
        try:
            memory = torch.frombuffer(mmap.mmap(mapped, 0), dtype=own[0].dtype).view(ranks, -1)
        finally:
            os.close(mapped)
        torch.cat([part.flatten() for part in own], out=memory[self._group.rank()])
        dist.barrier(self._group)  # every rank has opened it, and written
        if dist.get_rank() == self._owner:
            os.close(int(described))
        return memory
