"""Tensors come out of shared memory as they went in, however its halves cut them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from prism_megatron.rollout.shared_memory import Piece, SharedHalves

NAMED = [
    ("matrix", torch.randn(5, 7)),
    ("scalar", torch.tensor(3.0)),
    ("half", torch.randn(4, 3).bfloat16()),
    ("transposed", torch.randn(6, 2).T),
    ("counts", torch.arange(9)),
]
SIZE = sum(tensor.nbytes for _, tensor in NAMED)


@pytest.mark.parametrize("size", [2, 6, 64, 140 * 2, 144 * 2, SIZE, SIZE * 2, SIZE * 4])
def test_everything_arrives(size: int) -> None:
    sender = SharedHalves.create(size)
    receiver = SharedHalves(sender.descriptor)
    cuts: list[list[Piece]] = []
    arrived = list(receiver.read(noted(sender.fill(NAMED), cuts)))
    assert [name for name, _ in arrived] == [name for name, _ in NAMED]
    for (_, got), (_, sent) in zip(arrived, NAMED, strict=True):
        assert got.dtype == sent.dtype
        torch.testing.assert_close(got, sent, rtol=0, atol=0)
    lengths = [sum(piece.length for piece in pieces) for pieces in cuts]
    assert lengths == [size // 2] * (SIZE // (size // 2)) + [SIZE % (size // 2)] * bool(SIZE % (size // 2))


def test_what_arrived_stays_when_its_half_is_filled_again() -> None:
    memory = SharedHalves.create(8)
    arrived = list(memory.read(memory.fill([(str(number), torch.tensor(number)) for number in range(6)])))
    assert [int(tensor) for _, tensor in arrived] == list(range(6))


def noted(filled: Iterable[list[Piece]], into: list[list[Piece]]) -> Iterator[list[Piece]]:
    for pieces in filled:
        into.append(pieces)
        yield pieces


def test_a_tensor_without_elements() -> None:
    memory = SharedHalves.create(8)
    ((name, tensor),) = memory.read(memory.fill([("nothing", Tensor(0, 3))]))
    assert (name, tuple(tensor.shape)) == ("nothing", (0, 3))
