"""Layouts are exact inverses for whatever sizes, cut where Megatron cuts, and read no more than a rank's part."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.convert.rules import (
    COLUMNS,
    EXPERT_DOWN,
    EXPERT_UP,
    GATED,
    REPLICATED,
    ROWS,
    Layout,
    OfStack,
    Rule,
    flattened,
    grouped_qkv,
    headwise_qkv,
    padded_rows,
)

KINDS = (
    *("rows", "padded rows", "columns", "replicated", "gated", "grouped qkv", "headwise qkv", "headwise qkv bias"),
    *("expert up", "expert down", "flattened"),
)


def some_case(kind: str, ranks: int, rng: random.Random) -> tuple[Layout, list[tuple[int, ...]]]:
    """A layout and HF shapes that ``ranks`` divide, odd in every other respect."""
    a, b, c = (rng.randint(1, 7) for _ in range(3))
    if kind == "grouped qkv":
        groups, per_group, dim = ranks * a, b, c
        rows = (groups * per_group * dim, groups * dim, groups * dim)
        return grouped_qkv(per_group, dim), [(row, a + 2) for row in rows]
    return {
        "rows": (ROWS, [(ranks * a, b)]),
        "padded rows": (padded_rows(ranks * a + 7), [(ranks * a + 7, b)]),
        "columns": (COLUMNS, [(a, ranks * b)]),
        "replicated": (REPLICATED, [(a,)]),
        "gated": (GATED, [(ranks * a, b)] * 2),
        "headwise qkv": (headwise_qkv(b), [(3 * ranks * a * b, c)]),
        "headwise qkv bias": (headwise_qkv(b), [(3 * ranks * a * b,)]),
        "expert up": (EXPERT_UP, [(a, 2 * ranks * b)]),
        "expert down": (EXPERT_DOWN, [(ranks * a, b)]),
        "flattened": (flattened((a, 3, b, c, c)), [(a, 3, b, c, c)]),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(40):
        ranks = rng.choice((1, 2, 3, 4, 8))
        layout, shapes = some_case(kind, ranks, rng)
        dtype = rng.choice((torch.float32, torch.bfloat16))
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        whole = layout.join(tensors)
        shards = [layout.shard(whole, rank, ranks) for rank in range(ranks)]
        cut = [layout.join([layout.cut(t, rank, ranks) for t in tensors]) for rank in range(ranks)]
        assert all(map(torch.equal, shards, cut)), "a rank's part of the HF tensors makes its shard"
        assert all(map(torch.equal, layout.to_hf(shards), tensors))
        assert torch.equal(layout.join(layout.to_hf(shards)), whole)
        rule = Rule("x", tuple(f"t{i}" for i in range(len(shapes))), tuple(shapes), layout)
        assert rule.shard_shape(ranks) == tuple(shards[-1].shape)
        assert rule.numel == whole.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_blocks_of_the_megatron_matrix(kind: str) -> None:
    """Shards are equal blocks of one axis in each section, as distributed checkpoints assume."""
    rng = random.Random(f"blocks of {kind}")
    for _ in range(20):
        layout, shapes = some_case(kind, 2, rng)
        whole = layout.join([torch.randn(shape) for shape in shapes])
        if layout.axis is None:
            assert torch.equal(layout.shard(whole, 1, 2), whole)
            continue
        sections = whole.chunk(layout.megatron_sections, layout.megatron_axis)
        for rank in range(2):
            blocks = [section.chunk(2, layout.megatron_axis)[rank] for section in sections]
            block, shard = torch.cat(blocks, layout.megatron_axis), layout.shard(whole, rank, 2)
            missing = len(shard) - len(block)
            assert missing == 0 or (kind == "padded rows" and not shard[-missing:].any())
            assert torch.equal(shard[: len(block)], block)


def test_grouped_qkv_by_hand() -> None:
    q, k, v = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6]]), torch.tensor([[7.0], [8]])
    layout = grouped_qkv(2, 1)
    assert layout.join([q, k, v]).flatten().tolist() == [1, 2, 5, 7, 3, 4, 6, 8]
    assert layout.shard(layout.join([q, k, v]), 1, 2).flatten().tolist() == [3, 4, 6, 8]


def test_headwise_qkv_by_hand() -> None:
    assert headwise_qkv(1).join([torch.arange(6.0)]).tolist() == [0, 2, 4, 1, 3, 5]


def test_gated_shards_both_halves() -> None:
    full = GATED.join([torch.tensor([1.0, 2]), torch.tensor([3.0, 4])])
    assert GATED.shard(full, 1, 2).tolist() == [2, 4]


def test_expert_of_a_stack() -> None:
    stack = torch.arange(12.0).view(2, 3, 2)  # 2 experts, hidden 3, gate | up of width 1
    rule = Rule("x", ("s",), ((2, 3, 2),), EXPERT_UP, expert=1)
    assert EXPERT_UP.join([part[:] for part in rule.sources([stack])]).tolist() == [[6, 8, 10], [7, 9, 11]]


class Recorded:
    """A tensor that counts the values it hands out."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.read = tensor, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        part = self.tensor[index]
        self.read += part.numel()
        return part


@pytest.mark.parametrize(
    "layout", [ROWS, COLUMNS, headwise_qkv(2), EXPERT_UP], ids=["rows", "columns", "qkv", "expert"]
)
def test_a_rank_reads_its_part_only(layout: Layout) -> None:
    recorded = Recorded(torch.randn(24, 8))
    layout.cut(recorded, 1, 4)
    assert recorded.read == 24 * 8 // 4
    stack = Recorded(torch.randn(3, 24, 8))
    layout.cut(OfStack(stack, 2), 1, 4)
    assert stack.read == 24 * 8 // 4
