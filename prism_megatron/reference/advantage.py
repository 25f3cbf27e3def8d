"""Advantages of the paper's code (spec 4.5, 5.1).

A group of one keeps its raw score, which is on no common scale, and a group without any valid response is pushed down
by the format penalty (D8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism_megatron import advantage
from prism_megatron.advantage import AdvantageConfig, ScoredResponses


def group_normalize(scores: Tensor, groups: Tensor, eps: float, std_floor: float = 0.0) -> Tensor:
    """Return (s - mean) / (max(std, std_floor) + eps) within each group, but s / (1 + eps) in a group of one."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    normalized = advantage.group_normalize(scores, groups, eps, std_floor)
    return torch.where(counts[index] == 1, (scores.double() / (1 + eps)).float(), normalized)


def alignment_advantage(scored: ScoredResponses, config: AdvantageConfig) -> Tensor:
    """Return the advantage of each response, [N] float32, that of groups without a valid response included."""
    return advantage.combine_branches(scored, config, group_normalize)
