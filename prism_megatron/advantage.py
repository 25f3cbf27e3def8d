"""From scores to advantages, group by group (Eq. 3, spec 4.5, 5.1). Everything is [N], one entry per response."""

from __future__ import annotations

import torch
from torch import Tensor


def group_normalize(scores: Tensor, groups: Tensor, *, eps: float) -> Tensor:
    """(s - mean) / (std + eps) inside each group, std unbiased, [N] float32.

    A group of one has nothing to be compared with: its advantage is 0. (The paper's code leaves the raw score there,
    which is on no common scale.) A group of equal scores gives zeros.
    """
    index, size = _group_index(groups)
    counts = torch.bincount(index, minlength=size)
    scores = scores.float()
    zeros = torch.zeros(size, dtype=scores.dtype, device=scores.device)
    mean = zeros.index_add(0, index, scores) / counts
    centred = scores - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (counts - 1).clamp(min=1)
    return centred / (variance.sqrt()[index] + eps)


def grpo_advantage(rewards: Tensor, groups: Tensor, *, eps: float) -> Tensor:
    """Group-normalised rewards (GRPO, spec 5.1)."""
    return group_normalize(rewards, groups, eps=eps)


def alignment_advantage(
    perception_scores: Tensor,
    reasoning_scores: Tensor,
    format_valid: Tensor,
    groups: Tensor,
    *,
    perception_weight: float,
    format_penalty: float,
    combine: str,
    eps: float,
) -> Tensor:
    """Advantage of each response in the adversarial game (spec 4.5 with the repairs of 9.1).

    per_branch normalises each branch's scores in its group and adds them with weights alpha and 1 - alpha, as the
    released code does; weighted_sum adds the raw scores first and normalises once, as Eq. 1 and 3 say. A response
    outside the grammar stands one below the worst valid one of its group, and pays ``format_penalty`` on top. A group
    without any valid response has nothing to learn from: its advantages are 0 (D8).
    """
    alpha = perception_weight
    perception = _below_the_worst(perception_scores.float(), format_valid, groups)
    reasoning = _below_the_worst(reasoning_scores.float(), format_valid, groups)
    if combine == "per_branch":
        advantage = alpha * group_normalize(perception, groups, eps=eps)
        advantage = advantage + (1 - alpha) * group_normalize(reasoning, groups, eps=eps)
    else:
        assert combine == "weighted_sum"
        advantage = group_normalize(alpha * perception + (1 - alpha) * reasoning, groups, eps=eps)
    advantage = advantage - format_penalty * (~format_valid).float()
    index, size = _group_index(groups)
    any_valid = torch.zeros(size, device=groups.device).index_add(0, index, format_valid.float()) > 0
    return torch.where(any_valid[index], advantage, 0.0)


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """[N] bool: whether a response's group has rewards that differ, and so a gradient at all."""
    index, size = _group_index(groups)
    low = torch.full((size,), float("inf")).scatter_reduce(0, index, rewards.float(), "amin")
    high = torch.full((size,), float("-inf")).scatter_reduce(0, index, rewards.float(), "amax")
    return (high > low)[index]


def _group_index(groups: Tensor) -> tuple[Tensor, int]:
    """Group of each response counted from 0, [N], and how many groups there are."""
    names, index = torch.unique(groups, return_inverse=True)
    return index, len(names)


def _below_the_worst(scores: Tensor, valid: Tensor, groups: Tensor) -> Tensor:
    """Invalid entries replaced by their group's lowest valid score minus one (minus one if none is valid)."""
    index, size = _group_index(groups)
    worst = torch.full((size,), float("inf"))
    worst = worst.scatter_reduce(0, index[valid], scores[valid], "amin")
    worst = torch.where(worst.isinf(), 0.0, worst)
    return torch.where(valid, scores, worst[index] - 1)
