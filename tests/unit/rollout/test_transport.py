"""Tensors come out as they went in, however the halves cut them, and an end that is gone is noticed.

The ends are threads here: what each half holds is told through queues, as through the pipes of an engine.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from queue import Queue

import pytest
import torch
from torch import Tensor

from prism_megatron.rollout.transport import Collective, Disconnected, Invitation, Piece, Transport, create_transport

NAMED = [
    ("matrix", torch.randn(5, 7)),
    ("scalar", torch.tensor(3.0)),
    ("half", torch.randn(4, 3).bfloat16()),
    ("transposed", torch.randn(6, 2).T),
    ("counts", torch.arange(9)),
    ("nothing", Tensor(0, 3)),
]
SIZE = sum(tensor.nbytes for _, tensor in NAMED)
SOON = timedelta(seconds=2)

Named = list[tuple[str, Tensor]]


class Process:
    """An end of its own, which keeps what it received."""

    def __init__(self, invitation: Invitation) -> None:
        self._invitation, self._told, self.waits = invitation, Queue[list[Piece] | None](), threading.Semaphore(0)

    def run(self) -> Named:
        return list(self._invitation().receive(self._announced()))

    def tell(self, pieces: list[Piece] | None) -> None:
        self._told.put(pieces)

    def _announced(self) -> Iterator[list[Piece]]:
        while True:
            self.waits.release()
            if (pieces := self._told.get()) is None:
                return
            yield pieces


def sent(owner: Transport, named: Named, processes: int) -> tuple[list[Named], list[list[Piece]]]:
    """What every process received, and what was announced."""
    ends = [Process(invitation) for invitation in owner.invitations(processes)]
    cuts: list[list[Piece]] = []

    def announce(pieces: list[Piece]) -> None:
        cuts.append(pieces)
        for end in ends:
            end.tell(pieces)
        for end in ends:
            assert end.waits.acquire(timeout=600)

    with ThreadPoolExecutor(processes) as threads:
        running = [threads.submit(end.run) for end in ends]
        owner.connect()
        owner.send(named, announce)
        for end in ends:
            end.tell(None)
        return [one.result() for one in running], cuts


@pytest.mark.parametrize("size", [2, 6, 64, 140 * 2, 144 * 2, SIZE, SIZE * 2, SIZE * 4])
@pytest.mark.parametrize(("kind", "processes"), [("shared_memory", 1), ("collective", 1), ("collective", 2)])
def test_everything_arrives(kind: str, processes: int, size: int) -> None:
    arrived, cuts = sent(create_transport(kind, size), NAMED, processes)
    for named in arrived:
        assert [name for name, _ in named] == [name for name, _ in NAMED]
        for (_, got), (_, given) in zip(named, NAMED, strict=True):
            assert got.dtype == given.dtype
            torch.testing.assert_close(got, given, rtol=0, atol=0)
    lengths = [sum(piece.length for piece in pieces) for pieces in cuts]
    rest = [SIZE % (size // 2)] if SIZE % (size // 2) else []
    assert [length for length in lengths if length] == [size // 2] * (SIZE // (size // 2)) + rest


@pytest.mark.parametrize("kind", ["shared_memory", "collective"])
def test_an_end_lives_through_a_restart_of_the_others(kind: str) -> None:
    owner = create_transport(kind, 8)
    for first in (0, 6):
        named = [(str(number), torch.tensor(number)) for number in range(first, first + 6)]
        (arrived,), _ = sent(owner, named, 1)
        assert [int(tensor) for _, tensor in arrived] == list(range(first, first + 6))


def test_a_process_that_never_joins_is_not_waited_for() -> None:
    owner = Collective(8, SOON)
    owner.invitations(1)
    with pytest.raises(Disconnected, match=r"no process group formed within 0:00:02"):
        owner.connect()


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "hangs"])
def test_a_process_that_does_not_take_part_is_not_waited_for(gone: bool) -> None:
    owner = Collective(1 << 26, SOON)
    (invitation,) = owner.invitations(1)
    with ThreadPoolExecutor(1) as threads:
        ends = [threads.submit(invitation)]
        owner.connect()
        ends[0].result()
    if gone:
        ends.clear()
    with pytest.raises(Disconnected, match="Connection closed by peer" if gone else "[Tt]imed out"):
        owner.send([("large", torch.zeros(1 << 25, dtype=torch.uint8))], lambda _: None)


def test_memory_of_a_gpu_needs_one() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"rollout.transport=cuda_ipc needs CUDA, which is not available; use shar"
        ):
            create_transport("cuda_ipc", 8)
