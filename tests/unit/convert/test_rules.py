"""Layouts are exact inverses, and put values where Megatron expects them."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.convert.rules import COLUMNS, GATED, REPLICATED, ROWS, Layout, expert_up, grouped_qkv, headwise_qkv

CASES: list[tuple[str, Layout, list[tuple[int, ...]]]] = [
    ("rows", ROWS, [(8, 3)]),
    ("columns", COLUMNS, [(3, 8)]),
    ("replicated", REPLICATED, [(5,)]),
    ("gated", GATED, [(8, 3), (8, 3)]),
    ("grouped qkv", grouped_qkv(8, 4, 2), [(16, 3), (8, 3), (8, 3)]),
    ("headwise qkv", headwise_qkv(4), [(24, 3)]),
    ("headwise qkv bias", headwise_qkv(4), [(24,)]),
]


@pytest.mark.parametrize(("layout", "shapes"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trip_is_exact(layout: Layout, shapes: list[tuple[int, ...]], ranks: int) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    full = layout.join(tensors)
    again = layout.split(layout.unshard([layout.shard(full, rank, ranks) for rank in range(ranks)]))
    assert all(torch.equal(a, b) for a, b in zip(again, tensors, strict=True))


def test_grouped_qkv_by_hand() -> None:
    q, k, v = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6]]), torch.tensor([[7.0], [8]])
    layout = grouped_qkv(4, 2, 1)
    assert layout.join([q, k, v]).flatten().tolist() == [1, 2, 5, 7, 3, 4, 6, 8]
    assert layout.shard(layout.join([q, k, v]), 1, 2).flatten().tolist() == [3, 4, 6, 8]


def test_headwise_qkv_by_hand() -> None:
    assert headwise_qkv(2).join([torch.arange(6.0)]).tolist() == [0, 2, 4, 1, 3, 5]


def test_gated_shards_both_halves() -> None:
    full = GATED.join([torch.tensor([1.0, 2]), torch.tensor([3.0, 4])])
    assert GATED.shard(full, 1, 2).tolist() == [2, 4]


def test_expert_of_a_stack() -> None:
    stack = torch.arange(12.0).view(2, 3, 2)  # 2 experts, hidden 3, gate | up of width 1
    assert expert_up(1).join([stack]).tolist() == [[6, 8, 10], [7, 9, 11]]
