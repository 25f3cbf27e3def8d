"""Tensors arrive unchanged for any size of the buffer, and a missing process is noticed.

The other ends run in threads; the content of each half is announced through queues, instead of an engine's pipes.
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
    """Another end of the transport, which returns what it received."""

    def __init__(self, invitation: Invitation) -> None:
        self._invitation, self._announcements, self.waits = (
            invitation,
            Queue[list[Piece] | None](),
            threading.Semaphore(0),
        )

    def run(self) -> Named:
        return list(self._invitation().receive(self._announced()))

    def tell(self, pieces: list[Piece] | None) -> None:
        self._announcements.put(pieces)

    def _announced(self) -> Iterator[list[Piece]]:
        while True:
            self.waits.release()
            if (pieces := self._announcements.get()) is None:
                return
            yield pieces


def sent(own_end: Transport, named: Named, processes: int) -> tuple[list[Named], list[list[Piece]]]:
    """Send tensors; return what every process received, and what was announced."""
    ends = [Process(invitation) for invitation in own_end.invitations(processes)]
    cuts: list[list[Piece]] = []

    def announce(pieces: list[Piece]) -> None:
        cuts.append(pieces)
        for end in ends:
            end.tell(pieces)
        for end in ends:
            assert end.waits.acquire(timeout=600)

    with ThreadPoolExecutor(processes) as threads:
        running = [threads.submit(end.run) for end in ends]
        own_end.connect()
        own_end.send(named, announce)
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
    own_end = create_transport(kind, 8)
    for first in (0, 6):
        named = [(str(number), torch.tensor(number)) for number in range(first, first + 6)]
        (arrived,), _ = sent(own_end, named, 1)
        assert [int(tensor) for _, tensor in arrived] == list(range(first, first + 6))


def test_a_process_that_never_joins_is_not_waited_for() -> None:
    own_end = Collective(8, SOON)
    own_end.invitations(1)
    with pytest.raises(Disconnected, match=r"no process group formed within 0:00:02"):
        own_end.connect()


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "hangs"])
def test_a_process_that_does_not_take_part_is_not_waited_for(gone: bool) -> None:
    own_end = Collective(1 << 26, SOON)
    (invitation,) = own_end.invitations(1)
    with ThreadPoolExecutor(1) as threads:
        ends = [threads.submit(invitation)]
        own_end.connect()
        ends[0].result()
    if gone:
        ends.clear()
    with pytest.raises(Disconnected, match="Connection closed by peer" if gone else "[Tt]imed out"):
        own_end.send([("large", torch.zeros(1 << 25, dtype=torch.uint8))], lambda _: None)


def test_memory_of_a_gpu_needs_one() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match=r"rollout.transport=cuda_ipc needs CUDA, which is not available; use shar"
        ):
            create_transport("cuda_ipc", 8)
