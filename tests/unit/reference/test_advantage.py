"""Advantages of the paper's code that differ from ours, by hand (spec 4.5, D8)."""

from __future__ import annotations

import torch

from prism_megatron.advantage import AdvantageConfig, ScoredResponses
from prism_megatron.reference.advantage import alignment_advantage, group_normalize


def test_a_group_without_a_valid_response_is_pushed_down() -> None:
    invalid = torch.tensor([False, False])
    scored = ScoredResponses(
        torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), invalid, correct=invalid, groups=torch.tensor([0, 0])
    )
    assert alignment_advantage(scored, AdvantageConfig(0.5, 1.5, "per_branch", 1e-6)).tolist() == [-1.5, -1.5]


def test_a_group_of_one_keeps_its_raw_score() -> None:
    scores, groups = torch.tensor([9.0, 1.0, 1.0]), torch.tensor([3, 0, 0])
    assert group_normalize(scores, groups, eps=0.5).tolist() == [6.0, 0.0, 0.0]
