"""From scores to advantages, group by group (Eq. 3, spec 4.5, 5.1). Everything is [N], one entry per response."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prism_megatron.config import GatingConfig

_DUST = 1e-12, 1e-9  # absolute and relative: how far apart equal sums of float64 may be


def group_normalize(
    scores: Tensor, groups: Tensor, *, eps: float, std_floor: float = 0.0, compat: str = "fixed"
) -> Tensor:
    """(s - mean) / (max(std, std_floor) + eps) inside each group, [N] float32 computed in float64 (spec 4.5, 5.1).

    std is the unbiased deviation within the group. ``eps`` only keeps the division finite; ``std_floor`` (the paper has
    none) keeps scores that hardly differ from being blown up to advantages of full size.
    A group of one has nothing to be compared with: its advantage is 0. (In the paper's code, ``compat`` reference, it
    keeps its raw score, which is on no common scale.) A group of equal scores gives zeros, whatever its mean rounds to.
    """
    index, size = _group_index(groups)
    counts = torch.bincount(index, minlength=size)
    scores = scores.double()
    zeros = torch.zeros(size, dtype=scores.dtype, device=scores.device)
    mean = zeros.index_add(0, index, scores) / counts
    centred = scores - mean[index]
    variance = zeros.index_add(0, index, centred.square()) / (counts - 1).clamp(min=1)
    deviation = variance.sqrt().clamp(min=std_floor)
    normalized = torch.where(informative_groups(scores, groups), centred / (deviation[index] + eps), 0.0)
    if compat == "reference":
        normalized = torch.where(counts[index] == 1, scores / (1 + eps), normalized)
    return normalized.float()


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
    std_floor: float = 0.0,
    compat: str = "fixed",
    correct: Tensor,
    gating: GatingConfig,
) -> Tensor:
    """Advantage of each response in the adversarial game (spec 4.5 with the repairs of 9.1).

    per_branch normalises each branch's scores in its group and adds them with weights alpha and 1 - alpha, as the
    released code does; weighted_sum adds the raw scores first and normalises once, as Eq. 1 and 3 say. A response
    outside the grammar stands one below the worst valid one of its group, and pays ``format_penalty`` on top. A group
    without any valid response has nothing to learn from: its advantages are 0, gated or not (D8); ``compat`` reference
    pushes all of it down. ``std_floor`` is for scores; verified rewards have none.

    With a ``gating`` mode, which has penalties of its own; GN is group normalisation, c the ``align_coeff``, wp, fp,
    wa and wf its penalties and weights, F outside the grammar, W wrong though inside it:

        acc_gating  c A - wp W - fp F
        gated       c A (1 - F)(1 - W) - wp W - fp F
        rlvr        GN(wa acc + wf fmt) + c A (1 - F)(1 - W)
        rlvr_v2     GN(wa acc + wf fmt - wp W - fp F) + c A (1 - F)(1 - W)
        sign_align  GN(wa acc + wf fmt - wp W - fp F) + c A (1 - F)(1 - 2 W)
    """
    alpha = perception_weight
    perception = _below_the_worst(perception_scores.float(), format_valid, groups)
    reasoning = _below_the_worst(reasoning_scores.float(), format_valid, groups)

    def normalized(values: Tensor, floor: float = 0.0) -> Tensor:
        return group_normalize(values, groups, eps=eps, std_floor=floor, compat=compat)

    if combine == "per_branch":
        advantage = alpha * normalized(perception, std_floor) + (1 - alpha) * normalized(reasoning, std_floor)
    else:
        assert combine == "weighted_sum"
        advantage = normalized(alpha * perception + (1 - alpha) * reasoning, std_floor)
    if gating.mode == "none":
        advantage = advantage - format_penalty * (~format_valid).float()
    else:
        advantage = _gated(advantage, format_valid, correct, normalized, gating).float()
    if compat == "reference":
        return advantage
    index, size = _group_index(groups)
    any_valid = torch.zeros(size, device=groups.device).index_add(0, index, format_valid.float()) > 0
    return torch.where(any_valid[index], advantage, 0.0)


def _gated(
    align: Tensor, format_valid: Tensor, correct: Tensor, normalized: Callable[[Tensor], Tensor], gating: GatingConfig
) -> Tensor:
    # In float64, so that equal rewards made of different sums are equal but for dust.
    valid, accuracy = format_valid.double(), (correct & format_valid).double()
    wrong, invalid = valid - accuracy, 1 - valid
    align = gating.align_coeff * align
    reward = gating.accuracy_weight * accuracy + gating.format_weight * valid
    penalty = gating.wrong_penalty * wrong + gating.format_penalty * invalid
    if gating.mode == "acc_gating":
        return align - penalty
    if gating.mode == "gated":
        return align * valid * (1 - wrong) - penalty
    if gating.mode == "rlvr":
        return normalized(reward) + align * valid * (1 - wrong)
    if gating.mode == "rlvr_v2":
        return normalized(reward - penalty) + align * valid * (1 - wrong)
    assert gating.mode == "sign_align"
    return normalized(reward - penalty) + align * valid * (1 - 2 * wrong)


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """[N] bool: whether a response's group has rewards that differ by more than rounding, and so a gradient at all."""
    index, size = _group_index(groups)
    rewards = rewards.double()
    low = torch.full((size,), float("inf"), dtype=rewards.dtype).scatter_reduce(0, index, rewards, "amin")
    high = torch.full((size,), float("-inf"), dtype=rewards.dtype).scatter_reduce(0, index, rewards, "amax")
    absolute, relative = _DUST
    return (high - low > absolute + relative * torch.maximum(high.abs(), low.abs()))[index]


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
